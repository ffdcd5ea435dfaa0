"""`label-prefs --votes`: recorded judgements are not repeated, and the rows are the same as without it."""

import random
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows

from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure
from cai_cli.engines.scripted import ScriptedEngine

COT = ("--method", "cot", "--cot-samples", "2")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of the judge. Its answer depends only on the prompt; some prompts fail and some answers are certain."""
    seen: list[str] = []

    def scores(_: ScriptedEngine, question: LogprobRequest) -> list[float] | RequestFailure:
        seen.append(str(question.text) + question.prefill)
        rng = random.Random(seen[-1])
        answers = ([-60.0, 0.0], [0.0, -60.0], [-0.3, -1.0], RequestFailure("no answer"))
        return rng.choices(answers, weights=(4, 4, 3, 1))[0]

    def reply(_: ScriptedEngine, ask: GenerationRequest) -> Completion:
        seen.append(str(ask.text))
        return Completion(f"thought {ask.seed % 97}", "stop")

    monkeypatch.setattr(ScriptedEngine, "_scores", scores)
    monkeypatch.setattr(ScriptedEngine, "_reply", reply)
    return seen


@pytest.fixture
def label(cai: Cai, tmp_path: Path) -> Cai:
    write_rows(tmp_path / "samples.jsonl", [sample_row(i, k) for i in range(24) for k in range(2)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])

    def call(output: str, *more: str, stdin: bytes = b"") -> object:
        return cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", output, *more)

    return call


def all_rows(output: Path) -> list[object]:
    rejected = output.with_name(f"{output.name}.rejected.jsonl")
    return [rows_in(output), rows_in(rejected) if rejected.exists() else []]


def test_other_limits_repeat_no_judgement_and_give_the_same_rows(label: Cai, asked: list[str], tmp_path: Path) -> None:
    label("first.jsonl", *COT, "--clamp", "0.4,0.6")
    whole = len(asked)
    for number, (clamp, confidence) in enumerate([("0.2,0.8", "0.5"), ("0.4,0.6", "0.5"), ("0,1", "0.7")]):
        settings = (*COT, "--clamp", clamp, "--min-confidence", confidence)
        label(f"fresh{number}.jsonl", *settings)
        del asked[:]
        label(f"taken{number}.jsonl", *settings, "--votes", "first.jsonl")
        assert len(asked) < whole / 4  # the questions that had no answer, of principles that therefore have no votes
        assert all_rows(tmp_path / f"taken{number}.jsonl") == all_rows(tmp_path / f"fresh{number}.jsonl")
        assert manifest_of(tmp_path / f"taken{number}.jsonl")["provenance"]["input"]["votes"]


def test_with_more_principles_only_the_new_ones_are_judged(label: Cai, asked: list[str], tmp_path: Path) -> None:
    label("one.jsonl")
    first = set(asked)
    label("three.jsonl", "--principles-per-pair", "3")
    del asked[:]
    label("taken.jsonl", "--principles-per-pair", "3", "--votes", "one.jsonl")
    answered = {row["id"] for row in rows_in(tmp_path / "one.jsonl")}
    assert len(asked) == len(set(asked))
    assert len(asked) <= 24 * 6 - 2 * len(answered)
    assert len(first & set(asked)) <= len(first) - 2 * len(answered)
    assert all_rows(tmp_path / "taken.jsonl") == all_rows(tmp_path / "three.jsonl")


def test_votes_of_the_same_id_about_other_replies_are_not_used(label: Cai, asked: list[str], tmp_path: Path) -> None:
    label("before.jsonl")
    changed = [sample_row(i, k) for i in range(24) for k in range(2)]
    for row in changed:
        row["completion"] = [{"role": "assistant", "content": f"quite another reply {row['sample_index']}"}]
    write_rows(tmp_path / "samples.jsonl", changed)
    del asked[:]
    label("after.jsonl", "--votes", "before.jsonl")
    assert len(asked) == 48


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--clamp", "0.4,0.6", "--seed", "1"), "other-run", "settings.seed: 0 -> 1"),
        (("--clamp", "0.4,0.6", "--method", "choice"), "other-run", "settings.method: cot -> choice"),
        (("--clamp", "0.4,0.6", "--few-shot", "none"), "other-run", "constitution.fingerprint"),
    ],
)
def test_votes_of_a_different_judge_are_refused(
    words: tuple[str, ...], code: str, message: str, label: Cai, asked: list[str], tmp_path: Path
) -> None:
    label("cot.jsonl", "--method", "cot")
    more = words if "--method" in words else ("--method", "cot", *words)
    refused = label("other.jsonl", *more, "--votes", "cot.jsonl")
    assert (refused.code, refused.error) == (2, code)
    assert message in refused.stderr
    assert not (tmp_path / "other.jsonl").exists()


def test_votes_come_from_a_finished_labelling(label: Cai, asked: list[str], tmp_path: Path) -> None:
    refused = label("prefs.jsonl", "--votes", "samples.jsonl")
    assert (refused.code, refused.error) == (2, "not-made-by-cai")
    label("before.jsonl")
    with (tmp_path / "before.jsonl.rejected.jsonl").open("a") as file:
        file.write('{"key": "p", "reason": "tie", "row": "{"}\n')
    broken = label("after.jsonl", "--votes", "before.jsonl")
    assert (broken.code, broken.error) == (1, "invalid-row")


def test_votes_of_a_version_with_other_prompts_are_not_reused(label: Cai, tmp_path: Path) -> None:
    label("old.jsonl")
    manifest = tmp_path / "old.jsonl.manifest.json"
    manifest.write_text(manifest.read_text().replace('"cai": "0.2.0"', '"cai": "0.1.0"'))
    refused = label("new.jsonl", "--votes", "old.jsonl")
    assert (refused.code, refused.error) == (2, "other-run")
    assert not (tmp_path / "new.jsonl").exists()
