"""Prompts of exactly the context window, one token less, one more, and ten times it, with a sentinel at both ends: a
text arrives whole or its row is rejected with the numbers; training counts every row as used or rejected."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, write_rows
from tiny import tiny_model_dir

from cai_cli.data.schema import Message
from cai_cli.engines.tokenization import PromptEncoder, encode_chat
from cai_cli.models.reading import Reading
from cai_cli.reward.preference_model import encode_conversation

HEAD, TAIL = "first sentinel", "last sentinel"
NEW = 8
WINDOW = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_dir(tmp_path / "model", max_position_embeddings=WINDOW)
    return tmp_path


def tokens(folder: Path, messages: Sequence[Message], stage: str) -> int:
    """As many as the stage makes of it; a preference model reads no further than the end of turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if stage == "train-pm":
        return len(encode_conversation(tokenizer, messages, Reading()))
    return len(encode_chat(tokenizer, messages, add_generation_prompt=stage == "sample"))


def of_length(folder: Path, wanted: int, stage: str = "sample") -> list[Message]:
    """A chat of exactly `wanted` tokens whose longest text starts and ends with the sentinels: the user's where there
    is a reply to sample, else the assistant's."""
    reply = stage != "sample"

    def chat(count: int, odd: str) -> list[Message]:
        text = f"{HEAD}{' x' * count}{odd} {TAIL}"
        asked = Message(role="user", content="hi" if reply else text)
        return [asked, Message(role="assistant", content=text)] if reply else [asked]

    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(folder, chat(middle, ""), stage) <= wanted else (low, middle - 1)
    for odd in ("", "x", "xx", "xxx"):
        found = chat(low, odd)
        if tokens(folder, found, stage) == wanted:
            return found
    raise AssertionError(f"no chat of {wanted} tokens")


LENGTHS = {"one less": -1, "exactly": 0, "one more": 1, "ten times": 9 * WINDOW}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every text that the model is run over."""
    encoded: list[list[int]] = []
    encode = PromptEncoder.encode

    def noted(self: PromptEncoder, text: Any, continuation: str, **how: Any) -> list[int]:
        encoded.append(encode(self, text, continuation, **how))
        return encoded[-1]

    monkeypatch.setattr(PromptEncoder, "encode", noted)
    return encoded


def test_a_prompt_to_sample_from_arrives_whole_or_is_rejected_with_its_numbers(
    cai: Cai, folder: Path, seen: list[list[int]]
) -> None:
    limit = WINDOW - NEW
    chats = {name: of_length(folder, limit + more) for name, more in LENGTHS.items()}
    write_rows(
        folder / "in.jsonl", ({"id": name, "prompt": [m.model_dump() for m in chat]} for name, chat in chats.items())
    )
    words = (
        "sample",
        "in.jsonl",
        "--model",
        "model",
        "-o",
        "out.jsonl",
        "--max-new-tokens",
        str(NEW),
        "--skip-invalid",
    )
    done = cai(*words, "--json")
    assert done.code == 0, done.stderr
    counts = json.loads(done.stdout)
    assert (counts["in"], counts["rejected"]) == (4, 4 - counts["out"])
    refused = {row["key"]: row["reason"] for row in rows_in(folder / "out.jsonl.rejected.jsonl")}
    for name, more in LENGTHS.items():
        if more > 0:
            said = f"does not fit the context window of {WINDOW}: {limit + more} tokens + {NEW} new ones"
            assert refused[f"{name}/0"] == said
        else:  # a tiny model may well answer with nothing, which is another matter
            assert refused.get(f"{name}/0", "empty reply") == "empty reply"
    assert [len(ids) for ids in seen] == [limit + more for more in LENGTHS.values()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for ids in seen:
        text = tokenizer.decode(ids)
        assert HEAD in text
        assert TAIL in text
        assert text.index(HEAD) < text.index(TAIL)


def test_a_question_to_a_judge_arrives_whole_or_its_pair_is_rejected(
    cai: Cai, folder: Path, seen: list[list[int]]
) -> None:
    window = 4096
    tiny_model_dir(folder / "model", max_position_embeddings=window)

    def pair(size: int) -> list[Json]:
        shared: Json = {"id": "s", "prompt": [{"role": "user", "content": "hi"}], "kind": None, "source": None}
        shared |= {"finish_reason": "stop"}
        replies = (f"{HEAD} {'x' * size} {TAIL}", "no")
        return [
            {**shared, "sample_index": k, "completion": [{"role": "assistant", "content": reply}]}
            for k, reply in enumerate(replies)
        ]

    words = ("label-prefs", "in.jsonl", "--model", "model", "-o", "out.jsonl", "--one-order", "--overwrite", "--json")

    def asked(size: int) -> tuple[int, Json]:
        """Tokens of the question with its longest option, and what became of the pair."""
        seen.clear()
        write_rows(folder / "in.jsonl", pair(size))
        done = cai(*words)
        summary = json.loads(done.stdout)
        assert done.code == (summary["out"] == 0), done.stderr
        return max(map(len, seen)), summary

    base, found = asked(1)[0] - 1, {}
    for more in (-1, 0, 1, 9 * window):
        size = window + more - base
        longest, counts = asked(size)
        assert longest == window + more
        found[more] = (counts["rejected_reasons"], counts["out"] + counts["rejected"])
        from transformers import AutoTokenizer

        text = AutoTokenizer.from_pretrained(folder / "model").decode(seen[0])
        assert text.index(HEAD) < text.index(TAIL)
    for more, (reasons, pairs) in found.items():
        assert pairs == 1
        unfit = [reason for reason in reasons if "does not fit the context window" in reason]
        assert bool(unfit) == (more > 0), (more, reasons)


@pytest.mark.parametrize("stage", ["sft", pytest.param("train-pm", marks=pytest.mark.faults)])
def test_rows_to_train_on_are_used_whole_or_rejected_and_counted(
    stage: str, cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = {name: of_length(folder, WINDOW + more, stage) for name, more in LENGTHS.items()}
    short = of_length(folder, 120, stage)
    rows: list[Json] = []
    for name, chat in {**chats, "short": short}.items():
        prompt, reply = [chat[0].model_dump()], [chat[1].model_dump()]
        if stage == "sft":
            rows.append({"id": name, "prompt": prompt, "completion": reply})
        else:
            other = [{"role": "assistant", "content": "no"}]
            rows.append({"id": name, "prompt": prompt, "chosen": reply, "rejected": other, "p_chosen": 0.9, "votes": [],
                         "human": None, "source": None})  # fmt: skip
    write_rows(folder / "in.jsonl", rows)
    trained: list[list[int]] = []
    from cai_cli.phase1_supervised import sft
    from cai_cli.phase2_feedback import pm_pairs

    if stage == "sft":
        columns = sft.Encoded.columns
        monkeypatch.setattr(sft.Encoded, "columns", lambda self: trained.append(self.ids) or columns(self))  # type: ignore[func-returns-value]
    else:
        of_pair = pm_pairs.EncodedPair.columns
        monkeypatch.setattr(pm_pairs.EncodedPair, "columns", lambda self: trained.append(self.chosen) or of_pair(self))  # type: ignore[func-returns-value]
    words = (
        stage,
        "in.jsonl",
        "--model",
        "model",
        "-o",
        "out",
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--eval-share",
        "0",
    )
    done = cai(*words, "--max-length", str(WINDOW), "--json")
    assert done.code == 0, done.stderr
    counts = manifest_of(folder / "out")["counts"]
    assert (counts["in"], counts["used"], counts["rejected"], counts["skipped"]) == (5, 3, 2, 0)
    rejected = {row["key"].removesuffix("/0"): row for row in rows_in(folder / "out.rejected.jsonl")}
    assert rejected.keys() == {"one more", "ten times"}
    assert all("longer than" in row["reason"] for row in rejected.values())
    assert all(HEAD in row["row"] and TAIL in row["row"] for row in rejected.values())
    assert sorted(map(len, trained)) == [120, WINDOW - 1, WINDOW]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for ids in trained:
        text = tokenizer.decode(ids)
        assert text.index(HEAD) < text.index(TAIL)


@pytest.mark.parametrize("stage", ["sft", pytest.param("train-pm", marks=pytest.mark.faults)])
def test_a_max_length_beyond_the_window_does_not_let_longer_rows_in(stage: str, cai: Cai, folder: Path) -> None:
    chat = of_length(folder, WINDOW + 1, stage)
    short = of_length(folder, 120, stage)
    rows: list[Json] = []
    for name, (asked, reply) in {"long": chat, "short": short}.items():
        prompt, said = [asked.model_dump()], [reply.model_dump()]
        row: Json = {"id": name, "prompt": prompt, "completion": said}
        if stage == "train-pm":
            row = {"id": name, "prompt": prompt, "chosen": said, "rejected": [{"role": "assistant", "content": "no"}],
                   "p_chosen": 0.9, "votes": [], "human": None, "source": None}  # fmt: skip
        rows.append(row)
    write_rows(folder / "in.jsonl", rows)
    words = (
        stage,
        "in.jsonl",
        "--model",
        "model",
        "-o",
        "out",
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--eval-share",
        "0",
    )
    done = cai(*words, "--max-length", "100000", "--json")
    assert done.code == 0, done.stderr
    counts = manifest_of(folder / "out")["counts"]
    assert (counts["in"], counts["used"], counts["rejected"]) == (2, 1, 1)
