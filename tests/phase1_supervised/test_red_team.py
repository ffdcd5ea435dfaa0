"""New prompts from given ones, with a model that answers from a script."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, options_that, rows_in, write_rows

from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.prompting.red_team import TOPICS
from cai_cli.runtime.config import Effect

WORDS = [
    "apple",
    "bridge",
    "candle",
    "dragon",
    "engine",
    "forest",
    "guitar",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
]
# 14 * 14 replies that share few 5-grams, each fifth of them too short to be a prompt.
REPLIES = [
    f" {WORDS[i]} {WORDS[j]} {WORDS[(3 * i + 5 * j) % 15]} {WORDS[(7 * i + 2 * j) % 15]}" if i % 5 else " x"
    for i in range(14)
    for j in range(14)
]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    given = [{"id": f"g{i}", "prompt": f"How would {word} number {i} be stolen?"} for i, word in enumerate(WORDS)]
    write_rows(tmp_path / "given.jsonl", given)
    write_rows(tmp_path / "script.jsonl", [{"replies": REPLIES}])
    return tmp_path


ASK = ("red-team", "given.jsonl", "--model", "scripted:script.jsonl")


def test_the_requested_number_of_prompts_is_written_and_all_attempts_are_counted(cai: Cai, inputs: Path) -> None:
    done = cai(*ASK, "-n", "40", "-o", "new.jsonl", "--json")
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    rows, rejected = rows_in(inputs / "new.jsonl"), rows_in(inputs / "new.jsonl.rejected.jsonl")
    assert (len(rows), summary["out"]) == (40, 40)
    assert summary["in"] == 40 + len(rejected)
    assert {"too short", "near-duplicate of an earlier new prompt"} <= set(summary["rejected_reasons"])
    assert len({row["id"] for row in rows}) == 40
    assert {row["kind"] for row in rows} == {"red-team"}
    assert all(row["prompt"][0]["content"].startswith("How would ") for row in rows)
    topics = {topic: counts["out"] for topic, counts in summary["topics"].items() if counts["out"]}
    assert topics.keys() <= set(TOPICS["red-team"])
    assert sum(topics.values()) == 40
    assert sum(counts["rejected"] for counts in summary["topics"].values()) == len(rejected)
    assert f"kept, {summary['topics'][max(topics, key=topics.__getitem__)]['rejected']:>6,} rejected" in done.stderr


def test_every_option_is_recorded_hashed_or_harmless(cai: Cai, inputs: Path) -> None:
    cai(*ASK, "-n", "2", "-o", "new.jsonl")
    recorded = manifest_of(inputs / "new.jsonl")["provenance"]
    assert set(recorded["settings"]) == options_that("red-team", Effect.DECIDES)
    assert recorded["settings"]["topics"] == list(TOPICS["red-team"])


def test_sample_reads_the_output(cai: Cai, inputs: Path) -> None:
    cai(*ASK, "-n", "5", "-o", "new.jsonl", "--kind", "helpful", "--topics", "boats,knots")
    done = cai("sample", "new.jsonl", "-o", "samples.jsonl", "--model", "scripted:script.jsonl")
    assert done.code == 0, done.stderr
    rows = rows_in(inputs / "samples.jsonl")
    assert {row["source"] for row in rows} <= {"cai red-team: boats", "cai red-team: knots"}
    assert {row["kind"] for row in rows} == {"helpful"}


@pytest.mark.parametrize("more", [("--batch-size", "1"), ("--batch-size", "7")])
def test_the_same_seed_gives_the_same_prompts_in_any_batches(cai: Cai, inputs: Path, more: tuple[str, str]) -> None:
    cai(*ASK, "-n", "30", "-o", "a.jsonl")
    cai(*ASK, "-n", "30", "-o", "b.jsonl", *more)
    cai(*ASK, "-n", "30", "-o", "c.jsonl", "--seed", "1")
    a, b, c = ((inputs / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    assert not {row["id"] for row in rows_in(inputs / "a.jsonl")} & {row["id"] for row in rows_in(inputs / "c.jsonl")}


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_ends_with_the_same_bytes(
    cai: Cai, inputs: Path, torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cai(*ASK, "-n", "40", "-o", "calm.jsonl")
    answer, calls = ScriptedEngine.generate, 0

    def dying(
        self: ScriptedEngine, asks: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion | RequestFailure]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return answer(self, asks, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedEngine, "generate", dying)
        assert cai(*ASK, "-n", "40", "-o", "out.jsonl").code == 130
    partial = inputs / "out.jsonl.partial"
    assert partial.exists()
    if torn:  # a kill between the two files of a batch, and in the middle of a line
        lines = partial.read_bytes().splitlines(keepends=True)
        partial.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    done = cai(*ASK, "-n", "40", "-o", "out.jsonl")
    assert done.code == 0, done.stderr
    for name in ("jsonl", "jsonl.rejected.jsonl"):
        assert (inputs / f"out.{name}").read_bytes() == (inputs / f"calm.{name}").read_bytes()
    assert manifest_of(inputs / "out.jsonl")["counts"] == manifest_of(inputs / "calm.jsonl")["counts"]


def test_near_duplicates_of_given_and_excluded_prompts_are_rejected_with_their_line(cai: Cai, inputs: Path) -> None:
    (inputs / "old.txt").write_text("How would the boat sink in the harbour of my town?\n")
    script = [" apple number 0 be stolen??", " the boat sink in the harbour of my towns", " a cat sing at noon"]
    write_rows(inputs / "script.jsonl", [{"replies": script}])
    done = cai(*ASK, "-n", "2", "-o", "new.jsonl", "--exclude", "old.txt")
    assert done.code == 0
    assert len(rows_in(inputs / "new.jsonl")) == 1
    reasons = {
        row["reason"].partition(" (")[0].partition(":")[0] for row in rows_in(inputs / "new.jsonl.rejected.jsonl")
    }
    kinds = ("a given prompt", "a prompt of --exclude", "an earlier new prompt")
    assert reasons == {f"near-duplicate of {kind}" for kind in kinds}
    assert "48 attempts gave 1 of 2 prompts" in done.stderr  # 20 for each, to the end of a batch


def test_another_stdin_is_refused(cai: Cai, inputs: Path) -> None:
    words = ("red-team", "-", *ASK[2:], "-n", "3", "-o", "new.jsonl")
    assert cai(*words, stdin=b"one question?\nanother question?\n").code == 0
    done = cai(*words, stdin=b"one question?\na third question?\n")
    assert (done.code, done.error) == (1, "other-run")


def test_prompts_on_stdout_are_counted_by_topic_too(cai: Cai, inputs: Path) -> None:
    done = cai(*ASK, "-n", "5", "--topics", "none", "--json")
    assert len(done.stdout.splitlines()) == 5
    assert json.loads(done.stderr.splitlines()[-2])["topics"]["no topic"]["out"] == 5


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--kind", "evil"), (2, None)),  # Typer's own error
        (("--topics", " , "), (2, "invalid-option")),
        (("--limit", "1"), (1, "no-rows")),
    ],
)
def test_invalid_options_are_refused(cai: Cai, inputs: Path, more: Any, error: tuple[int, str | None]) -> None:
    done = cai(*ASK, "-o", "new.jsonl", *more)
    assert (done.code, done.error) == error
