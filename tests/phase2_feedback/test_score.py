import json
from pathlib import Path
from unittest.mock import patch

import orjson
import pytest
from conftest import Cai
from helpers import manifest_of, options_that, preference, revision, rows_in, stage, write_rows
from tiny import CHATML, tiny_model_dir

from cai_cli.common.errors import CaiError, InvalidRow
from cai_cli.data.formats import scorable
from cai_cli.data.jsonl import read_prompts
from cai_cli.data.schema import Message
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.reward import scorer
from cai_cli.reward.preference_model import score_conversations
from cai_cli.runtime.config import Effect

command = stage("score")
train_pm_stage = stage("train-pm")

HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(scope="module")
def pm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pm")
    model = tiny_model_dir(folder / "tiny")
    rows = write_rows(folder / "prefs.jsonl", [preference(i) for i in range(8)])
    train_pm_stage(rows, folder / "pm", model=str(model), max_steps=2, learning_rate=1e-3, eval_share=0.0, quiet=True)
    return folder / "pm"


def test_every_accepted_form_gives_a_row_with_the_score_of_its_conversation(pm: Path, tmp_path: Path) -> None:
    sample = {k: v for k, v in revision(1).items() if k != "history"}
    rows = [sample, revision(2), {"messages": CHAT}, {"prompt": "hi", "completion": "well"}, preference(3), HH]
    command(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", pm=str(pm))
    out = rows_in(tmp_path / "out.jsonl")
    assert len(out) == 8
    assert [(row["sample_index"], row["completion"][0]["content"]) for row in out[4:]] == [
        (0, "helpful"), (1, "harmful"), (0, "hello"), (1, "go away"),
    ]  # fmt: skip
    chats = [[Message(**m) for m in row["prompt"] + row["completion"]] for row in out]
    model, tokenizer = load_reward_model(pm), load_tokenizer(pm)
    alone = [score_conversations(model, tokenizer, [chat])[0] for chat in chats]
    assert [row["score"] for row in out] == pytest.approx(alone, abs=1e-4)
    assert out[2]["score"] == pytest.approx(out[6]["score"])  # the same conversation in two forms
    assert manifest_of(tmp_path / "out.jsonl")["counts"]["out"] == 8


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")])
def test_a_pair_has_the_scores_that_it_had_in_training(tmp_path: Path, template: str, cai: Cai) -> None:
    base = tiny_model_dir(tmp_path / "tiny", chat_template=template, pad_token=None)  # the end of turn is the padding
    rows = [preference(i, chosen=f"a helpful answer {'very ' * i}") for i in range(12)]
    file, pm = write_rows(tmp_path / "prefs.jsonl", rows), tmp_path / "pm"
    train_pm_stage(file, pm, model=str(base), max_steps=2, learning_rate=1e-2, eval_share=0.5, quiet=True)
    assert json.loads((pm / "preference_model.json").read_text())["read_at"] == "end-of-turn"
    done = cai("score", str(file), "--pm", str(pm), "-o", "out.jsonl", "--batch-size", "3")
    assert "was not trained by" not in done.stderr
    scores = {(row["id"], row["sample_index"]): row["score"] for row in rows_in(tmp_path / "out.jsonl")}
    held_out = rows_in(pm / "held_out.jsonl")
    assert len(held_out) == 6
    for row in held_out:
        both = [scores[row["id"], 0], scores[row["id"], 1]]
        assert both == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=1e-4)


def test_replies_to_one_prompt_without_ids_are_all_scored(pm: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": reply} for reply in ("a", "b", "a")]
    command(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", pm=str(pm))
    assert [row["completion"][0]["content"] for row in rows_in(tmp_path / "out.jsonl")] == ["a", "b"]
    counts = manifest_of(tmp_path / "out.jsonl")["counts"]
    assert (counts["in"], counts["out"], counts["skipped"]) == (3, 2, 1)


def test_a_conversation_that_does_not_fit_is_rejected_as_a_readable_row(pm: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "x"}, {"id": "long", "prompt": "hi", "completion": "long " * 600}]
    command(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", pm=str(pm))
    assert len(rows_in(tmp_path / "out.jsonl")) == 1
    (rejected,) = rows_in(tmp_path / "out.jsonl.rejected.jsonl")
    assert "window of 512 tokens" in rejected["reason"]
    assert scorable(json.loads(rejected["row"]), "x").id == "long"


def test_an_interrupted_run_ends_with_the_same_bytes(pm: Path, tmp_path: Path) -> None:
    rows = [{"id": f"c{i}", "prompt": f"question {i}", "completion": "word " * (i % 7 + 1)} for i in range(20)]
    file = write_rows(tmp_path / "in.jsonl", rows)
    command(file, tmp_path / "whole.jsonl", pm=str(pm), batch_size=2)
    calls = 0
    plain = scorer.score_ids

    def dying(*arguments: object) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(*arguments)  # type: ignore[arg-type]

    with patch.object(scorer, "score_ids", dying), pytest.raises(KeyboardInterrupt):
        command(file, tmp_path / "killed.jsonl", pm=str(pm), batch_size=2)
    assert len(rows_in(tmp_path / "killed.jsonl.partial")) == 8
    command(file, tmp_path / "killed.jsonl", pm=str(pm), batch_size=2)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": CHAT[:1]}, "assistant"),
        ({"messages": [*CHAT, {"role": "user", "content": "more"}]}, "assistant"),
        ({"prompt": "hi"}, "no completion"),
        ("just text", "no completion"),
    ],
)
def test_a_row_without_a_reply_is_an_error_with_its_line(pm: Path, tmp_path: Path, row: object, problem: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(orjson.dumps({"messages": CHAT}) + b"\n" + orjson.dumps(row) + b"\n")
    with pytest.raises(InvalidRow) as error:
        command(str(file), tmp_path / "out.jsonl", pm=str(pm))
    assert (error.value.file, error.value.line) == (str(file), 2)
    assert problem in error.value.reason


def test_scores_of_another_preference_model_are_not_mixed_in(pm: Path, tmp_path: Path) -> None:
    file, other = write_rows(tmp_path / "in.jsonl", [{"messages": CHAT}]), tmp_path / "other"
    train_pm_stage(
        write_rows(tmp_path / "prefs.jsonl", [preference(1)]), other, model=str(pm), max_steps=1, eval_share=0.0
    )
    command(file, tmp_path / "out.jsonl", pm=str(pm))
    with pytest.raises(CaiError) as error:
        command(file, tmp_path / "out.jsonl", pm=str(other))
    assert error.value.code == "other-run"


def test_scored_rows_are_prompts_and_can_be_scored_again(pm: Path, tmp_path: Path) -> None:
    command(write_rows(tmp_path / "in.jsonl", [{"messages": CHAT}]), tmp_path / "out.jsonl", pm=str(pm))
    ((_, prompt),) = read_prompts(str(tmp_path / "out.jsonl"))
    assert prompt.prompt[0].content == "hi"
    command(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", pm=str(pm))
    assert rows_in(tmp_path / "again.jsonl") == rows_in(tmp_path / "out.jsonl")


def test_scores_come_through_a_pipe(pm: Path, cai: Cai) -> None:
    done = cai("score", "-", "--pm", str(pm), "--quiet", stdin=orjson.dumps({"id": 7, "messages": CHAT}) + b"\n")
    assert (done.code, done.stderr) == (0, "")
    row = json.loads(done.stdout)
    assert (row["id"], row["sample_index"], isinstance(row["score"], float)) == ("7", 0, True)


def test_only_the_part_of_the_input_decides_the_output() -> None:
    assert options_that("score", Effect.DECIDES) == {"column", "limit", "pm_dtype", "shard"}
