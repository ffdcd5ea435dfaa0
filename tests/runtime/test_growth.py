"""A finished output grows with its limit or its input: what is there stays, and only new rows are requested."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import Died, death_after, manifest_of, rows_in, sample_row, write_rows

from cai_cli.engines.base import GenerationRequest, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.runtime import sinks
from cai_cli.runtime.growth import growth_of

SCRIPT = ("--model", "scripted:script.jsonl", "--batch-size", "2")
SAMPLE = ("sample", "prompts.jsonl", *SCRIPT, "-n", "2", "-o", "out.jsonl")
LABEL = ("label-prefs", "samples.jsonl", *SCRIPT, "--few-shot", "none", "--one-order", "-o", "out.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prompts(tmp_path, 6)
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(4) for k in range(3)))
    rows: list[dict[str, Any]] = [
        {"contains": "question 1", "replies": [""], "scores": [-1.0, -1.0]},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]},
    ]
    write_rows(tmp_path / "script.jsonl", rows)
    return tmp_path


def write_prompts(folder: Path, count: int, first: int = 0) -> None:
    write_rows(folder / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(first, count)))


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows of the requests that reach the model."""
    labels: list[str] = []
    generate = ScriptedEngine.generate

    def recorded(self: ScriptedEngine, requests: Sequence[GenerationRequest], sampling: Sampling) -> Any:
        labels.extend(request.row for request in requests)
        return generate(self, requests, sampling)

    monkeypatch.setattr(ScriptedEngine, "generate", recorded)
    return labels


def files(folder: Path) -> dict[str, bytes]:
    """The files of the output, without what a manifest records about the run."""
    found = {}
    for path in folder.glob("out.jsonl*"):
        found[path.name] = path.read_bytes()
        if path.name.endswith("manifest.json"):
            manifest = json.loads(found[path.name])
            kept = {k: v for k, v in manifest.items() if k not in ("run", "grown")}
            found[path.name] = json.dumps(kept).encode()
    return found


@pytest.mark.parametrize("words", [SAMPLE, LABEL], ids=["sample", "label-prefs"])
@pytest.mark.parametrize("ending", ["", ".zst"])
def test_an_output_that_grew_is_that_of_one_run(words: tuple[str, ...], ending: str, cai: Cai, folder: Path) -> None:
    words = (*words[:-1], f"out.jsonl{ending}")
    assert cai(*words).code == 0
    whole = files(folder)
    assert cai(*words, "--overwrite", "--limit", "2").code == 0
    for limit in (("--limit", "5"), ()):
        done = cai(*words, *limit)
        assert done.code == 0, done.stderr
        assert "grows" in done.stderr
    assert files(folder) == whole
    assert "already finished" in cai(*words).stderr


def test_only_new_rows_are_requested_and_the_manifest_says_so(cai: Cai, folder: Path, requested: list[str]) -> None:
    assert cai(*SAMPLE, "--limit", "2").code == 0
    first = manifest_of(folder / "out.jsonl")
    before, rejected = (folder / "out.jsonl").read_bytes(), (folder / "out.jsonl.rejected.jsonl").read_bytes()
    requested.clear()
    assert cai(*SAMPLE, "--limit", "4").code == 0
    assert requested == ["p2/0", "p2/1", "p3/0", "p3/1"]
    assert (folder / "out.jsonl").read_bytes().startswith(before)
    assert (folder / "out.jsonl.rejected.jsonl").read_bytes() == rejected
    manifest = manifest_of(folder / "out.jsonl")
    assert manifest["provenance"]["settings"]["limit"] == 4
    (state,) = manifest["grown"]
    assert (state["rows"], state["limit"], state["input"]) == (first["rows"], 2, first["provenance"]["input"])
    assert state["counts"] == {"in": 4, "out": 2, "rejected": 2, "skipped": 0}


def test_rows_at_the_end_of_the_input_are_requested_and_rows_elsewhere_are_another_run(
    cai: Cai, folder: Path, requested: list[str]
) -> None:
    write_prompts(folder, 3)
    assert cai(*SAMPLE).code == 0
    finished = files(folder)
    for change in (lambda: write_prompts(folder, 6, first=1), lambda: write_prompts(folder, 2)):
        change()
        requested.clear()
        refused = cai(*SAMPLE)
        assert (refused.code, refused.error, requested) == (1, "other-run", [])
        assert files(folder) == finished
    write_prompts(folder, 5)
    assert cai(*SAMPLE).code == 0
    assert requested == ["p3/0", "p3/1", "p4/0", "p4/1"]


@pytest.mark.parametrize("option", [("--seed", "1"), ("--limit", "2"), ("--temperature", "0.5")])
def test_no_other_setting_may_change_and_a_limit_only_grows(option: tuple[str, ...], cai: Cai, folder: Path) -> None:
    assert cai(*SAMPLE, "--limit", "4").code == 0
    finished = files(folder)

    refused = cai(*SAMPLE, *(() if "--limit" in option else ("--limit", "6")), *option)
    assert (refused.code, refused.error) == (1, "other-run")
    assert files(folder) == finished


def test_an_invalid_line_of_the_old_rows_counts_as_unchanged(cai: Cai, folder: Path) -> None:
    words, path = (*SAMPLE, "--skip-invalid"), folder / "prompts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{\n"]))
    assert cai(*words).code == 0
    path.write_bytes(b"".join([*lines[:2], b"{\n", *lines[2:], b"{{\n"]))
    assert cai(*words).code == 0
    grown = files(folder)
    assert cai(*words, "--overwrite").code == 0
    assert files(folder) == grown
    path.write_bytes(b"".join([*lines[:2], b"{ \n", *lines[2:]]))
    assert cai(*words).error == "other-run"


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_growth_is_completed_and_the_finished_output_stays_until_then(
    calls: int, cai: Cai, folder: Path
) -> None:
    assert cai(*SAMPLE).code == 0
    whole = files(folder)
    assert cai(*SAMPLE, "--overwrite", "--limit", "2").code == 0
    finished = (folder / "out.jsonl").read_bytes()
    with death_after(calls):
        cai(*SAMPLE)
    assert (folder / "out.jsonl").read_bytes() == finished
    assert cai(*SAMPLE).code == 0
    assert files(folder) == whole


def test_a_kill_before_the_copy_is_complete_costs_no_finished_row(
    cai: Cai, folder: Path, requested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cai(*SAMPLE, "--limit", "3").code == 0
    copy = sinks.write_atomically

    def die(path: Path, blocks: Any) -> None:
        raise Died

    monkeypatch.setattr(sinks, "write_atomically", die)
    with pytest.raises(Died):
        cai(*SAMPLE)
    monkeypatch.setattr(sinks, "write_atomically", copy)
    requested.clear()
    assert cai(*SAMPLE).code == 0
    assert [label[:2] for label in requested] == ["p3", "p3", "p4", "p4", "p5", "p5"]


def test_an_unfinished_output_goes_on_with_a_larger_limit(cai: Cai, folder: Path, requested: list[str]) -> None:
    assert cai(*SAMPLE).code == 0
    whole = files(folder)
    (folder / "out.jsonl").unlink()
    with death_after(1):
        cai(*SAMPLE, "--limit", "3", "--overwrite")
    requested.clear()
    assert cai(*SAMPLE, "--limit", "1").error == "other-run"
    assert cai(*SAMPLE).code == 0
    assert "p0/0" not in requested
    assert files(folder) == whole


def test_a_run_that_wrote_nothing_is_forgotten_when_its_input_is_mended(cai: Cai, folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("{\n")
    assert cai(*SAMPLE).error == "invalid-row"
    write_prompts(folder, 2)
    assert cai(*SAMPLE).code == 0
    assert len(rows_in(folder / "out.jsonl")) == 2


def test_shards_grow_and_merge_to_the_grown_whole(cai: Cai, folder: Path) -> None:
    words = ("sample", "prompts.jsonl", *SCRIPT)
    for limit in (("--limit", "3"), ()):
        for i in (1, 2):
            assert cai(*words, *limit, "--shard", f"{i}/2", "-o", f"s{i}.jsonl").code == 0
    assert cai("merge", "s1.jsonl", "s2.jsonl", "-o", "merged.jsonl").code == 0
    assert cai(*words, "-o", "out.jsonl").code == 0
    assert (folder / "merged.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()


def test_a_random_pairing_does_not_grow_because_new_replies_change_old_pairs(cai: Cai, folder: Path) -> None:
    assert cai(*LABEL, "--pairs", "random", "--limit", "5").code == 0
    assert cai(*LABEL, "--pairs", "random").error == "other-run"


def test_an_output_without_a_manifest_or_with_an_old_one_does_not_grow(tmp_path: Path) -> None:
    current = {"stage": "sample", "cai": "0.2.0", "input": {"prompts": "b"}, "settings": {"limit": None}}
    path = tmp_path / "out.jsonl"
    assert growth_of(path, current, "prompts") is None
    path.touch()
    assert growth_of(path, current, "prompts") is None
    old = {"provenance": current | {"input": {"prompts": "a"}}, "counts": {}, "run": {}}
    (tmp_path / "out.jsonl.manifest.json").write_text(json.dumps(old))
    assert growth_of(path, current, "prompts") is None
