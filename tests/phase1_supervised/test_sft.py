import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    interrupted_after,
    largest_difference,
    manifest_of,
    revision,
    rows_in,
    stage,
    user,
    write_rows,
)
from tiny import declare_only_end_of_text, tiny_model_dir

from cai_cli.common.errors import CaiError, InvalidRow, RowError
from cai_cli.data.formats import completed_row
from cai_cli.data.schema import Message, Revision, Sample, load_row
from cai_cli.models.loading import load_generation_config, load_tokenizer
from cai_cli.phase1_supervised.sft import CutOff, SftConfig, encode_all, examples_of, read_examples
from cai_cli.runtime.counts import Counts
from cai_cli.training.checkpoints import SEAL
from cai_cli.training.completions import encode

command = stage("sft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 2, "learning_rate": 1e-3, "eval_share": 0.0}


def test_the_loss_falls_and_the_output_loads_as_a_plain_model(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(40)])
    out = tmp_path / "sl-cai"
    command(rows, out, model=str(model), epochs=3, **QUICK | {"eval_share": 0.1})
    results = manifest_of(out)["metrics"]
    assert results["loss"] < results["loss_before"] - 1
    assert results["held_out_loss"] < results["held_out_loss_before"] - 1
    assert largest_difference(model, out) > 1e-3
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).model_max_length == 512
    assert (out / "README.md").read_text().startswith("---\n")
    assert not list(tmp_path.glob("*.partial*"))


def test_every_step_has_one_row_of_metrics_with_the_same_keys(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(16)])
    command(rows, tmp_path / "out", model=str(model), **QUICK)
    metrics = rows_in(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert len({tuple(row) for row in metrics}) == 1


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_run_ends_with_the_parameters_of_one_that_was_not(
    model: Path, tmp_path: Path, lora: bool
) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i, f"answer {i * 7}" + " more" * (i % 5)) for i in range(20)])
    run = {"model": str(model), "epochs": 3, "save_steps": 2, "lora": lora, **QUICK}
    command(rows, tmp_path / "whole", **run)
    with interrupted_after(7):  # epochs are of 3 steps, the newest checkpoint is of step 6
        command(rows, tmp_path / "killed", **run)
    saved = sorted(p.name for p in (tmp_path / "killed.partial").glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "killed").exists()
    command(rows, tmp_path / "killed", **run)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    assert rows_in(tmp_path / "whole/metrics.jsonl") == rows_in(tmp_path / "killed/metrics.jsonl")


def test_a_batch_has_examples_of_similar_length_and_an_epoch_has_every_example(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

    batches: list[list[int]] = []
    collate = Collator.torch_call

    def seen(self: Collator, rows: list[dict[str, list[int]]]) -> dict[str, object]:
        batches.append([len(row["input_ids"]) for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(Collator, "torch_call", seen)
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i, "word " * (1 + i * 7 % 40)) for i in range(40)])
    helpful = write_rows(
        tmp_path / "help.jsonl", [{"prompt": f"help {i}", "completion": "sure " * i} for i in range(1, 25)]
    )
    command(rows, tmp_path / "out", model=str(model), helpful=helpful, **QUICK)
    trained = sum(map(sum, batches))
    assert sum(map(len, batches)) == 40 + 24
    assert sum(len(batch) * max(batch) for batch in batches) < 1.1 * trained  # 1.4 in batches drawn at random
    run = manifest_of(tmp_path / "out")["run"]["training"]
    assert run["data_order"] == "all examples in a new random order every epoch, in batches of similar length"


def test_an_incomplete_checkpoint_is_skipped(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i, f"answer {i * 7}") for i in range(20)])
    run = {"model": str(model), "epochs": 3, "save_steps": 2, **QUICK}
    command(rows, tmp_path / "whole", **run)
    with interrupted_after(7):
        command(rows, tmp_path / "killed", **run)
    torn = tmp_path / "killed.partial/checkpoint-6/optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    torn.with_name(SEAL).unlink()  # which is written last
    command(rows, tmp_path / "killed", **run)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0


KILLED = """
import os, signal, sys
from cai_cli.phase1_supervised.sft import SftConfig, run
from cai_cli.training.metrics_log import Metrics
put = Metrics.put
def dying(self, step, values):
    put(self, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.put = dying
run(SftConfig(input=sys.argv[1], output=sys.argv[2], model=sys.argv[3], epochs=3, save_steps=2, batch_size=4,
              gradient_accumulation=2, learning_rate=1e-3, eval_share=0.0))
"""


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_to_the_same_parameters(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i, f"answer {i * 7}" + " more" * (i % 5)) for i in range(20)])
    run = {"model": str(model), "epochs": 3, "save_steps": 2, **QUICK}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, rows, str(tmp_path / "killed"), str(model)], env=dict(os.environ), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    command(rows, tmp_path / "killed", **run)
    command(rows, tmp_path / "whole", **run)
    assert largest_difference(tmp_path / "whole", tmp_path / "killed") == 0
    assert rows_in(tmp_path / "whole/metrics.jsonl") == rows_in(tmp_path / "killed/metrics.jsonl")


def test_a_row_that_is_too_long_is_rejected_and_counted_not_truncated(model: Path, tmp_path: Path) -> None:
    rows = [revision(i) for i in range(8)] + [revision(8, "long " * 200)]
    command(write_rows(tmp_path / "rev.jsonl", rows), tmp_path / "out", model=str(model), max_length=128, **QUICK)
    (rejected,) = rows_in(tmp_path / "out.rejected.jsonl")
    assert (rejected["key"], rejected["reason"]) == ("r8/0", "longer than --max-length")
    counts = manifest_of(tmp_path / "out")["counts"]
    assert (counts["in"], counts["used"], counts["rejected"]) == (9, 8, 1)


def test_a_changed_learning_rate_is_refused_by_name_and_nothing_is_lost(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(20)])
    run = {"model": str(model), "save_steps": 1, **QUICK}
    with interrupted_after(2):
        command(rows, tmp_path / "out", **run)
    with pytest.raises(CaiError, match=r"settings\.learning_rate: 0\.001 -> 0\.002") as error:
        command(rows, tmp_path / "out", **run | {"learning_rate": 2e-3})
    assert error.value.code == "other-run"
    assert "--overwrite" in str(error.value.hint)
    command(rows, tmp_path / "out", **run)
    with pytest.raises(CaiError) as error:
        command(rows, tmp_path / "out", **run | {"learning_rate": 2e-3})
    assert error.value.code == "other-run"
    command(rows, tmp_path / "out", **run | {"learning_rate": 2e-3, "overwrite": True})
    assert manifest_of(tmp_path / "out")["provenance"]["settings"]["learning_rate"] == 2e-3


def test_all_trains_on_the_revision_of_every_round_and_last_on_the_final_one() -> None:
    row = load_row(Revision, revision(0, "final", rounds=3))
    assert [e.reply for e in examples_of(row, "all")] == ["attempt 1", "attempt 2", "final"]
    assert [e.reply for e in examples_of(row, "last")] == ["final"]


def test_helpful_examples_are_drawn_by_ratio_and_the_rest_is_counted(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(8)])
    helpful = write_rows(tmp_path / "help.jsonl", [{"prompt": f"help {i}", "completion": "sure"} for i in range(30)])
    command(rows, tmp_path / "out", model=str(model), helpful=helpful, helpful_ratio=0.5, **QUICK)
    counts = manifest_of(tmp_path / "out")["counts"]
    assert (counts["in"], counts["used"], counts["skipped"]) == (38, 12, 26)


def test_revisions_and_helpful_replies_of_several_files_are_mixed_and_counted_by_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def helpful(name: str, count: int) -> str:
        replies = [{"prompt": f"{name} {i}", "completion": "sure"} for i in range(count)]
        return str(write_rows(tmp_path / f"{name}.jsonl", replies))

    own = write_rows(tmp_path / "own.jsonl", [revision(i) for i in range(6)])
    shipped = write_rows(tmp_path / "shipped.jsonl", [revision(100 + i) for i in range(4)])
    mixed = {"also": [str(shipped)], "helpful": helpful("own-help", 3), "also_helpful": [helpful("more-help", 9)]}
    run = {"model": str(model), "max_steps": 1, "limit": 5, "helpful_ratio": 2.0, **QUICK | {"eval_share": 0.2}}
    summary = command(own, tmp_path / "out", **run, **mixed)
    by_input = {"revisions": 5, "also 1": 4, "helpful": 3, "also helpful 1": 9}
    manifest = manifest_of(tmp_path / "out")
    assert summary["used_by_input"] == manifest["counts"]["used_by_input"] == by_input
    assert manifest["counts"]["used"] == 21
    assert set(manifest["provenance"]["input"]) == by_input.keys()
    assert "used by input: revisions (5), also 1 (4), helpful (3), also helpful 1 (9)" in capsys.readouterr().err
    assert (
        "| used_by_input | revisions 5, also 1 4, helpful 3, also helpful 1 9 |"
        in (tmp_path / "out/README.md").read_text()
    )
    write_rows(shipped, [revision(200 + i) for i in range(4)])
    with pytest.raises(CaiError, match="input.also 1: ") as error:
        command(own, tmp_path / "out", **run, **mixed)
    assert error.value.code == "other-run"


def test_the_loss_covers_the_reply_and_its_end_of_turn_only(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    prompt = [Message(role="user", content="What is it?")]
    columns = encode(tokenizer, prompt, "a helpful answer").columns()
    trained = [i for i in columns["labels"] if i != -100]
    assert tokenizer.decode(trained) == "a helpful answer<|im_end|>\n"
    assert [i for i, label in zip(columns["input_ids"], columns["labels"], strict=True) if label != -100] == trained


def cut_rows(folder: Path) -> Path:
    """Eight whole replies and four that were cut off, one of them in an earlier round."""
    rows = [revision(i) for i in range(11)]
    for row in rows[:3]:
        row["finish_reason"] = "length"
    rows.append(revision(11, rounds=2))
    rows[-1]["history"][1]["finish_reason"] = "length"
    return write_rows(folder / "cut.jsonl", rows)


def test_the_loss_of_a_reply_that_was_cut_off_does_not_cover_an_end_of_turn(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = [load_row(Revision, revision(i) | {"finish_reason": end}) for i, end in enumerate(("length", "stop", None))]
    text, closed = "a helpful and honest answer", "a helpful and honest answer<|im_end|>\n"
    for cut_off, expected in (
        (CutOff.OPEN, [text, closed, closed]),
        (CutOff.SKIP, [closed, closed]),
        (CutOff.WHOLE, [closed, closed, closed]),
    ):
        counts = Counts.of_training([])
        examples = [example for row in rows for example in examples_of(row, "all")]
        encoded = encode_all(tokenizer, examples, 512, counts, window=512, cut_off=cut_off)
        labels = [[i for i in each.columns()["labels"] if i != -100] for _, each in encoded]
        assert [tokenizer.decode(ids) for ids in labels] == expected
        assert counts.reply_ends.as_json() == {"replies": {"whole": 1, "cut_off": 1, "unknown": 1}}
        assert counts.skipped == ({"cut off at the length limit": 1} if cut_off is CutOff.SKIP else {})


@pytest.mark.parametrize(("cut_off", "used"), [("open", 13), ("skip", 9)])
def test_replies_that_were_cut_off_are_counted_and_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut_off: str, used: int
) -> None:
    command(cut_rows(tmp_path), tmp_path / "out", model=str(model), cut_off=cut_off, max_steps=1, **QUICK)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["reply_ends"] == {"replies": {"whole": 9, "cut_off": 4, "unknown": 0}}
    assert manifest["counts"]["used"] == used
    assert f"4 of 13 replies cut off at the length limit; they are {'left' if used == 9 else 'trained'}" in (
        capsys.readouterr().err
    )


def test_a_control_token_in_row_text_is_encoded_as_text(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    prompt = [Message(role="user", content="hi")]
    ids = encode(tokenizer, prompt, "x<|im_end|>\n<|im_start|>system").ids
    assert ids.count(tokenizer.eos_token_id) == 3  # system, user, assistant
    assert "x<|im_end|>\n<|im_start|>system" in tokenizer.decode(ids)


def test_rows_with_prompt_and_completion_are_read_unchanged() -> None:
    row = completed_row({"prompt": "hi", "completion": "hello"})
    assert isinstance(row, Sample)
    assert row.reply == "hello"
    assert completed_row({"prompt": user("hi"), "completion": [{"role": "assistant", "content": "yo"}]}).reply == "yo"
    for bad in ({"prompt": "hi"}, {"prompt": "hi", "completion": 3}, 7):
        with pytest.raises(RowError):
            completed_row(bad)


def test_an_invalid_line_is_an_error_with_file_and_line(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rev.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(InvalidRow) as error:
        command(str(rows), tmp_path / "out", model=str(model), **QUICK)
    assert (error.value.file, error.value.line) == (str(rows), 2)
    assert not list(tmp_path.glob("out*"))


def test_revision_rows_feed_trls_sft_trainer_unchanged(model: Path, tmp_path: Path) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(4)])
    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(tmp_path / "cache"))
    config = SFTConfig(
        str(tmp_path / "trl"), max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(str(model), config, train_dataset=data)
    assert trainer.train().training_loss > 0


def test_conversations_of_other_tools_are_trained_on_at_their_last_reply(model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "human", "value": "bye"}]
    helpful = [{"instruction": f"q{i}", "input": "", "output": "a", "topic": "x"} for i in range(2)]
    write_rows(tmp_path / "helpful.jsonl", helpful)
    (tmp_path / "in.json").write_text(json.dumps([{"conversations": turns, "id": f"c{i}"} for i in range(2)], indent=1))
    options = {"model": str(model), "helpful": str(tmp_path / "helpful.jsonl"), "max_steps": 1, "eval_share": 0.0}
    summary = command(tmp_path / "in.json", tmp_path / "out", **options)
    assert (summary["used"], summary["dropped"]) == (4, {"topic": 2})


def test_the_finished_model_ends_its_turn_in_plain_transformers(tmp_path: Path) -> None:
    """The base model names another end than its chat template, as base models do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = declare_only_end_of_text(tiny_model_dir(tmp_path / "base"))
    pair = [{"prompt": "Name a fruit.", "completion": "A pear."}, {"prompt": "Name a town.", "completion": "Bern."}]
    options = {"max_steps": 40, "learning_rate": 1e-2, "gradient_accumulation": 1, "eval_share": 0.0}
    command(write_rows(tmp_path / "pair.jsonl", pair), tmp_path / "sl", model=str(base), **options)
    model, tokenizer = (kind.from_pretrained(tmp_path / "sl") for kind in (AutoModelForCausalLM, AutoTokenizer))
    chat = [{"role": "user", "content": "Name a fruit."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "A pear.<|im_end|>"
    command(tmp_path / "pair.jsonl", tmp_path / "lora", model=str(base), **options | {"lora": True, "max_steps": 1})
    assert load_generation_config(tmp_path / "lora").eos_token_id == [0, 2]


def test_a_student_is_trained_without_the_system_prompt_of_its_teacher(model: Path, tmp_path: Path) -> None:
    with_system = [{"role": "system", "content": "Be warm."}, {"role": "user", "content": "question 1"}]
    plain = [revision(i) for i in range(8)]
    rows = write_rows(tmp_path / "taught.jsonl", [plain[0], *(row | {"prompt": with_system} for row in plain[1:])])
    config = SftConfig(input=str(rows), output=str(tmp_path / "out"), model=str(model), drop_system=True, eval_share=0)
    data = read_examples(config, model)
    kept = read_examples(config.model_copy(update={"drop_system": False}), model)
    assert "Be warm." in data.tokenizer.decode(kept.train[-1].ids)
    assert not any("Be warm." in data.tokenizer.decode(one.ids) for one in data.train)
    assert (len(data.train), data.counts.as_json()["dropped"]) == (len(kept.train), {"system prompt": 7})
