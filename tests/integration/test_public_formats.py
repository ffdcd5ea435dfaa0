"""Ten public formats, converted, are read by plain TRL trainers unchanged; TRL's own converters agree with ours."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model_dir

from cai_cli.data.formats import completed_row, parse_preference
from cai_cli.data.schema import Message, Preference, load_row
from cai_cli.models.loading import load_tokenizer
from cai_cli.phase2_feedback.dpo_pairs import encode_replies
from cai_cli.training.completions import encode

pytestmark = pytest.mark.slow

TALKS = (
    ("Name a fruit.", "A pear.", "A stone."),
    ("How do I boil an egg?", "Seven minutes in boiling water.", "I do not know."),
    ("Wie heißt der Fluss in Köln? 🙂", "Der Rhein.", "Die Spree."),
)
U, G, B = (
    {"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), TALKS[0], strict=True)
)
Made = dict[str, Any]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def shared(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def transcript(user: str, reply: str) -> str:
    return f"\n\nHuman: {user}\n\nAssistant: {reply}"


def openai_result(number: int, reply: str) -> Made:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}
    return {
        "id": f"b{number}",
        "custom_id": f"r{number}",
        "response": {"status_code": 200, "body": body},
        "error": None,
    }


def anthropic_result(number: int, reply: str) -> Made:
    message = {"role": "assistant", "content": [{"type": "text", "text": reply}], "stop_reason": "end_turn"}
    return {"custom_id": f"r{number}", "result": {"type": "succeeded", "message": message}}


# Name -> (a row of number, question and reply; the options of `cai convert`; what it leaves out of the three rows).
REPLIES: dict[str, tuple[Callable[[int, str, str], Made], tuple[str, ...], dict[str, int]]] = {
    "UltraChat": (lambda i, u, g: {"prompt": u, "prompt_id": f"u{i}", "messages": said(u, g)}, (), {"prompt_id": 3}),
    "ShareGPT": (lambda i, u, g: {"id": f"s{i}", "conversations": shared(u, g), "lang": "en"}, (), {"lang": 3}),
    "Alpaca": (lambda _, u, g: {"instruction": u, "input": "", "output": g, "text": f"{u} {g}"}, (), {"text": 3}),
    "LMSYS": (
        lambda i, u, g: {
            "conversation_id": f"l{i}",
            "model": "m",
            "conversation": said(u, g),
            "turn": 1,
            "redacted": False,
        },
        (),
        {"model": 3, "turn": 3, "redacted": 3},
    ),
    "OpenAI batch": (lambda i, _, g: openai_result(i, g), ("--prompts", "openai-requests.jsonl"), {}),
    "Anthropic batch": (lambda i, _, g: anthropic_result(i, g), ("--prompts", "anthropic-requests.jsonl"), {}),
    "Dolly as CSV": (
        lambda _, u, g: {"ask": u, "told": g, "category": "open, qa"},
        ("--column", "prompt=ask,completion=told"),
        {"category": 3},
    ),
}
PAIRS: dict[str, tuple[Callable[[int, str, str, str], Made], tuple[str, ...], dict[str, int]]] = {
    "HH-RLHF": (lambda _, u, g, b: {"chosen": transcript(u, g), "rejected": transcript(u, b)}, (), {}),
    "UltraFeedback": (
        lambda i, u, g, b: {"prompt": u, "prompt_id": f"p{i}", "chosen": said(u, g), "rejected": said(u, b),
                            "messages": said(u, g), "score_chosen": 8.5, "score_rejected": 2.0},
        ("--soft-from", "score"),
        {"prompt_id": 3, "messages": 3},
    ),
    "Orca pairs as parquet": (
        lambda _, u, g, b: {"system": "", "question": u, "chosen": g, "rejected": b, "generator": "m"},
        (),
        {"generator": 3},
    ),
}  # fmt: skip


def write_file(folder: Path, name: str, rows: list[Made]) -> str:
    """The file of a format, as people have it: CSV, parquet, a JSON array, or JSON lines."""
    import pyarrow
    from pyarrow import parquet

    if "CSV" in name:
        with (folder / "in.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        return "in.csv"
    if "parquet" in name:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "in.parquet")
        return "in.parquet"
    text = json.dumps(rows, indent=1) if name == "ShareGPT" else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return f"{name}.json"


def converted(cai: Cai, folder: Path, formats: dict[str, Any], count: int) -> Any:
    """The rows of all formats together, each file as `datasets` loads what `cai convert` writes.

    Args:
        cai: The command line.
        folder: A directory.
        formats: `REPLIES` or `PAIRS`.
        count: How many texts of a talk a format takes.
    """
    from datasets import concatenate_datasets, load_dataset

    bodies = [{"model": "m", "max_tokens": 9, "messages": said(question)} for question, *_ in TALKS]
    for name, key in (("openai", "body"), ("anthropic", "params")):
        requests = [json.dumps({"custom_id": f"r{i}", key: body}) for i, body in enumerate(bodies)]
        (folder / f"{name}-requests.jsonl").write_text("\n".join(requests))
    files = []
    for name, (row, options, dropped) in formats.items():
        file = write_file(folder, name, [row(i, *talk[:count]) for i, talk in enumerate(TALKS)])
        done = cai("convert", file, "-o", f"{name}.jsonl", *options, "--json")
        assert done.code == 0, done.stderr
        summary = json.loads(done.stdout)
        assert (summary["out"], summary.get("dropped", {})) == (len(TALKS), dropped), name
        files.append(str(folder / f"{name}.jsonl"))
    cache = str(folder / "cache")
    return concatenate_datasets([load_dataset("json", data_files=f, split="train", cache_dir=cache) for f in files])


def arguments(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "run"), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def test_trl_fine_tunes_on_converted_conversations_and_trains_the_tokens_of_cai_sft(cai: Cai, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    data = converted(cai, tmp_path, REPLIES, count=2)
    talks = [(said(question), [{"role": "assistant", "content": good}]) for question, good, _ in TALKS]
    assert [(row["prompt"], row["completion"]) for row in data] == talks * len(REPLIES)
    model = tiny_model_dir(tmp_path / "model")
    trainer = SFTTrainer(str(model), args=SFTConfig(**arguments(tmp_path)), train_dataset=data)
    assert trainer.train().training_loss > 0
    tokenizer = load_tokenizer(model)
    ours = [encode(tokenizer, [Message(**m) for m in row["prompt"]], row["completion"][0]["content"]) for row in data]
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset] == [
        each.columns() for each in ours
    ]


def test_trl_trains_a_reward_model_on_converted_pairs(cai: Cai, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    data = converted(cai, tmp_path, PAIRS, count=3)
    model = str(tiny_model_dir(tmp_path / "model"))
    trainer = RewardTrainer(model, args=RewardConfig(**arguments(tmp_path)), train_dataset=data)
    assert trainer.train().training_loss > 0


def test_trl_aligns_on_converted_pairs_and_trains_the_tokens_of_cai_dpo(cai: Cai, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    data = converted(cai, tmp_path, PAIRS, count=3)
    talks = [
        (said(question), *([{"role": "assistant", "content": text}] for text in replies))
        for question, *replies in TALKS
    ]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in data] == talks * len(PAIRS)
    assert [row["p_chosen"] for row in data][3] == pytest.approx(0.9985, abs=1e-4)
    model = tiny_model_dir(tmp_path / "model")
    trainer = DPOTrainer(str(model), args=DPOConfig(**arguments(tmp_path)), train_dataset=data)
    assert trainer.train().training_loss > 0
    tokenizer, names = load_tokenizer(model), ("prompt_ids", "chosen_ids", "rejected_ids")
    ours = [encode_replies(tokenizer, load_row(Preference, row)).columns() for row in data]
    assert [{name: row[name] for name in names} for row in trainer.train_dataset] == [
        {name: row[name] for name in names} for row in ours
    ]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=3))
def test_trl_converts_sharegpt_rows_to_the_same_messages(texts: list[str]) -> None:
    """TRL keeps the names of roles as they are, so the rows here have its own."""
    from trl.data_utils import maybe_convert_to_chatml

    speakers = [pair for text in texts for pair in (("user", text), ("assistant", f"re {text}"))]
    turns = [{"from": who, "value": text} for who, text in speakers]
    theirs = maybe_convert_to_chatml({"conversations": [dict(turn) for turn in turns]})["messages"]
    sample = completed_row({"conversations": turns})
    assert [m.model_dump() for m in [*sample.prompt, *sample.completion]] == theirs


@settings(deadline=None)
@given(st.text(min_size=1, max_size=5).filter(str.strip), st.text(max_size=5), st.text(max_size=5))
def test_trl_splits_a_pair_that_parts_at_its_last_turn_in_the_same_place(question: str, one: str, other: str) -> None:
    from trl.data_utils import maybe_extract_prompt

    def whole(reply: str) -> list[dict[str, str]]:
        return [U, G, {"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    pair = {"chosen": whole(f"good {one}"), "rejected": whole(f"bad {other}")}
    ours, theirs = parse_preference(pair, source="s"), maybe_extract_prompt(dict(pair))
    for side in ("prompt", "chosen", "rejected"):
        assert [m.model_dump() for m in getattr(ours, side)] == theirs[side]
