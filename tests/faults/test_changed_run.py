"""The same output asked for by another run: refused with each difference, whether it is finished or half done, and
nothing is touched; what decides no row may change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cai
from forked import files_of
from helpers import Died, Json, sample_row, write_rows

from cai_cli.runtime.sinks import FileSink

BASE = ("--model", "scripted:script.jsonl", "-o", "out.jsonl")
STAGES = {
    "sample": ("sample", "prompts.jsonl", *BASE),
    "critique-revise": ("critique-revise", "samples.jsonl", *BASE, "--rounds", "1", "--constitution", "critique.yaml"),
    "label-prefs": ("label-prefs", "samples.jsonl", *BASE, "--one-order", "--constitution", "prefs.yaml"),
}
CRITIQUE = """\
name: mine
kind: critique-revision
principles:
  - {id: a, critique: "What is wrong with it?", revision: "Mend it."}
"""
PREFS = """\
name: mine
kind: preference
principles:
  - {id: a, comparison: "Which reply is better?"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(3)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(3) for k in range(2)))
    rows: list[Json] = [{"replies": ["one.", "two."], "scores": [-0.1, -3.0]}]
    write_rows(tmp_path / "script.jsonl", rows)
    write_rows(tmp_path / "other.jsonl", [{**rows[0], "replies": ["else."]}])
    (tmp_path / "critique.yaml").write_text(CRITIQUE)
    (tmp_path / "prefs.yaml").write_text(PREFS)
    return tmp_path


def another_input(folder: Path) -> None:
    for name in ("prompts.jsonl", "samples.jsonl"):
        path = folder / name
        path.write_text(path.read_text().replace("question 2", "question 2?"))


def another_constitution(folder: Path) -> None:
    for name in ("critique.yaml", "prefs.yaml"):
        path = folder / name
        path.write_text(path.read_text().replace("?", "??"))


# what changed -> (options, change of a file, version, what is named)
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[Path], None] | None, str | None, str]] = {
    "model": (("--model", "scripted:other.jsonl"), None, None, "model.fingerprint: "),
    "template": (("--prompt-format", "raw"), None, None, "settings.prompt_format: chat -> raw"),
    "temperature": (("--temperature", "0.5"), None, None, "settings.temperature: 1.0 -> 0.5"),
    "top-p": (("--top-p", "0.5"), None, None, "settings.top_p: 1.0 -> 0.5"),
    "length": (("--max-new-tokens", "9"), None, None, "settings.max_new_tokens: "),
    "seed": (("--seed", "7"), None, None, "settings.seed: 0 -> 7"),
    "limit": (("--limit", "2"), None, None, "settings.limit: nothing -> 2"),
    "input": ((), another_input, None, "input."),
    "constitution": ((), another_constitution, None, "constitution.fingerprint: "),
    "version": ((), None, "9.9.9", "cai: "),
}
MATRIX = [
    pytest.param(stage, what, marks=[] if stage == "sample" or what == "constitution" else [pytest.mark.faults])
    for stage in STAGES
    for what in CHANGES
    if (stage, what) != ("sample", "constitution")
]


def begun(stage: str, finished: bool, cai: Cai, monkeypatch: pytest.MonkeyPatch) -> None:
    if finished:
        done = cai(*STAGES[stage])
        assert done.code == 0, done.stderr
        return
    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "finish", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            cai(*STAGES[stage])


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half done"])
@pytest.mark.parametrize(("stage", "what"), MATRIX)
def test_a_run_that_would_make_other_rows_is_refused_with_the_difference(
    stage: str, what: str, finished: bool, cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, change, version, named = CHANGES[what]
    begun(stage, finished, cai, monkeypatch)
    before = files_of(folder)
    if change:
        change(folder)
    if version:
        monkeypatch.setattr("cai_cli.runtime.manifest.__version__", version)
    refused = cai(*STAGES[stage], *options)
    assert (refused.code, refused.error) == (1, "other-run")
    if what == "input" and finished:  # it might have gained rows, so it is compared row by row
        assert "rows of the input are not those that the output was made from" in refused.stderr
    else:
        assert named in refused.stderr
        assert refused.stderr.count(" -> ") == 1
    assert files_of(folder) == before


def test_all_differences_are_named_at_once(cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun("sample", True, cai, monkeypatch)
    refused = cai(*STAGES["sample"], "--seed", "7", "--top-p", "0.5", "--model", "scripted:other.jsonl")
    assert refused.error == "other-run"
    for named in ("settings.seed", "settings.top_p", "model.fingerprint"):
        assert named in refused.stderr


HARMLESS = [("--batch-size", "1"), ("--device", "cpu"), ("--skip-invalid",), ("--skip-invalid", "--max-invalid", "7"), ("--quiet",),
            ("--json",), ("--concurrency", "3"), ("--timeout", "9"), ("--price-in", "1"), ("--budget-tokens", "99")]  # fmt: skip


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half done"])
def test_what_decides_no_row_may_change(
    finished: bool, cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun("sample", True, cai, monkeypatch)
    calm = files_of(folder)
    for more in HARMLESS:
        for path in folder.glob("out.jsonl*"):
            path.unlink()
        begun("sample", finished, cai, monkeypatch)
        server = more[0] in ("--concurrency", "--timeout", "--price-in", "--budget-tokens")
        again = cai(*STAGES["sample"], *more)
        if server and again.code == 2:  # such an option is refused where no server is asked
            continue
        assert again.code == 0, (more, again.stderr)
        assert files_of(folder) == calm, more
    moved = folder / "elsewhere"
    moved.mkdir()
    shutil.move(folder / "prompts.jsonl", moved / "prompts.jsonl")
    again = cai("sample", "elsewhere/prompts.jsonl", *BASE, "--json")
    assert (again.code, json.loads(again.stdout)["status"]) == (0, "already finished" if finished else "finished")
