"""Repeated ids, and inputs that changed after the run began, are noticed or make no difference."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, death_after, manifest_of, rows_in, sample_row, write_rows

SCRIPT = ("--model", "scripted:script.jsonl")
STAGES = ("sample", "critique", "critique-revise", "label-prefs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]}])
    return tmp_path


def given_rows(stage: str) -> list[Json]:
    if stage == "sample":
        return [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(12)]
    return [sample_row(i, k) for i in range(12) for k in range(2)]


def as_stdin(rows: Sequence[Json]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def words(stage: str, output: str, *more: str) -> tuple[str, ...]:
    one_order = ("--one-order",) if stage == "label-prefs" else ()
    return (stage, "-", *SCRIPT, "--batch-size", "3", "-o", output, *one_order, *more)


def begin(cai: Cai, *command: str, stdin: bytes) -> None:
    """The command, dead after two calls of the engine."""
    with death_after(2):
        cai(*command, stdin=stdin)


@pytest.mark.parametrize("stage", STAGES)
def test_another_row_under_a_finished_id_is_noticed_when_a_pipe_is_resumed(stage: str, cai: Cai, folder: Path) -> None:
    rows = given_rows(stage)
    more = ("--rounds", "1") if stage == "critique-revise" else ()
    assert cai(*words(stage, "calm.jsonl", *more), stdin=as_stdin(rows)).code == 0
    begin(cai, *words(stage, "out.jsonl", *more), stdin=as_stdin(rows))
    partial = (folder / "out.jsonl.partial").read_bytes()
    assert partial
    changed = [{**rows[0], "source": "elsewhere"}, *rows[1:]]
    refused = cai(*words(stage, "out.jsonl", *more), stdin=as_stdin(changed))
    assert (refused.code, refused.error) == (1, "input-changed")
    assert "line 1: 'p0/0" in refused.stderr
    assert (folder / "out.jsonl.partial").read_bytes() == partial
    assert cai(*words(stage, "out.jsonl", *more), stdin=as_stdin(rows)).code == 0
    assert (folder / "out.jsonl").read_bytes() == (folder / "calm.jsonl").read_bytes()
    assert not list(folder.glob("out.jsonl.units*"))


def test_rows_in_another_order_on_resume_end_in_the_same_rows(cai: Cai, folder: Path) -> None:
    rows = given_rows("critique")
    assert cai(*words("critique", "calm.jsonl"), stdin=as_stdin(rows)).code == 0
    begin(cai, *words("critique", "out.jsonl"), stdin=as_stdin(rows))
    finished = len((folder / "out.jsonl.partial").read_bytes().splitlines())
    random.Random(0).shuffle(rows)
    again = cai(*words("critique", "out.jsonl"), stdin=as_stdin(rows))
    assert again.code == 0, again.stderr
    assert f"{finished} rows are finished" in again.stderr
    assert sorted((folder / "out.jsonl").read_bytes().splitlines()) == sorted(
        (folder / "calm.jsonl").read_bytes().splitlines()
    )


def test_a_file_in_another_order_is_another_input(cai: Cai, folder: Path) -> None:
    rows = given_rows("sample")
    write_rows(folder / "in.jsonl", rows)
    begin(cai, "sample", "in.jsonl", *SCRIPT, "--batch-size", "3", "-o", "out.jsonl", stdin=b"")
    assert not (folder / "out.jsonl.units.jsonl").exists(), "the hash of the file says it all"
    write_rows(folder / "in.jsonl", rows[::-1])
    refused = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl")
    assert (refused.code, refused.error) == (1, "other-run")


def test_a_finished_output_is_done_only_for_the_rows_it_was_made_of(cai: Cai, folder: Path) -> None:
    rows = given_rows("sample")
    assert cai(*words("sample", "out.jsonl"), stdin=as_stdin(rows)).code == 0
    made = (folder / "out.jsonl").read_bytes()
    again = cai(*words("sample", "out.jsonl"), stdin=as_stdin(rows))
    assert (again.code, "nothing to do" in again.stderr) == (0, True)
    for other in (rows[:-1], [], [*rows[:-1], {**rows[-1], "prompt": "else"}]):
        refused = cai(*words("sample", "out.jsonl"), stdin=as_stdin(other))
        assert (refused.code, refused.error) == (1, "other-run")
        assert (folder / "out.jsonl").read_bytes() == made


@pytest.mark.parametrize("second", ["7", 7])
def test_an_id_twice_is_an_error_with_both_lines_whether_number_or_text(
    second: str | int, cai: Cai, folder: Path
) -> None:
    write_rows(
        folder / "in.jsonl", [{"id": 7, "prompt": "a"}, {"id": "8", "prompt": "b"}, {"id": second, "prompt": "c"}]
    )
    for more in ((), ("--skip-invalid",)):
        refused = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", *more)
        assert (refused.code, refused.error) == (1, "duplicate-id")
        assert "in.jsonl:3: id '7/0' was already used on line 1" in refused.stderr


def test_a_number_as_an_id_and_the_same_text_are_one_id_in_any_run(cai: Cai, folder: Path) -> None:
    for name, prompt_id in (("number", 12), ("text", "12")):
        write_rows(folder / f"{name}.jsonl", [{"id": prompt_id, "prompt": "a", "source": "s"}])
        assert cai("sample", f"{name}.jsonl", *SCRIPT, "-o", f"{name}.out").code == 0
    assert rows_in(folder / "number.out") == rows_in(folder / "text.out")
    assert manifest_of(folder / "number.out")["rows"] == manifest_of(folder / "text.out")["rows"]
