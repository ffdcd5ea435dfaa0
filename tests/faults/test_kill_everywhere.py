"""SIGKILL at every system call that changes a file, in every data stage: the same command again ends in the bytes of a
run left alone, whatever stands at the output's name is whole, and nothing is left beside it."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Ran
from forked import Forks, clear, files_of, held, needs_strace, until
from helpers import Json, sample_row, write_rows

CALLS = ("fsync", "write", "rename", "unlink", "ftruncate", "mkdir", "openat")
SCRIPT = ("--model", "scripted:script.jsonl", "--batch-size", "2")
STAGES = {
    "sample": ("sample", "prompts.jsonl", *SCRIPT, "-n", "2", "--skip-invalid"),
    "critique": ("critique", "samples.jsonl", *SCRIPT),
    "revise": ("revise", "critiques.jsonl", *SCRIPT),
    "critique-revise": ("critique-revise", "samples.jsonl", *SCRIPT, "--rounds", "2"),
    "label-prefs": ("label-prefs", "samples.jsonl", *SCRIPT, "--one-order"),
    "a shard": ("sample", "prompts.jsonl", *SCRIPT, "--skip-invalid", "--shard", "1/2"),
    "merge": ("merge", "shard1.jsonl", "shard2.jsonl"),
    "sort": ("sort", "samples.jsonl", "--by", "length"),
    "dedup": ("dedup", "samples.jsonl"),
}
OUTPUT = {**dict.fromkeys(STAGES, "out.jsonl"), "compressed": "out.jsonl.zst"}
STAGES["compressed"] = STAGES["sample"]
STAGES["overwritten"], OUTPUT["overwritten"] = (*STAGES["sample"], "--seed", "1", "--overwrite"), "out.jsonl"
STAGES["grown"], OUTPUT["grown"] = STAGES["sample"], "out.jsonl"  # of an output with a smaller limit
STAGES["grown and compressed"], OUTPUT["grown and compressed"] = STAGES["sample"], "out.jsonl.zst"


def words(stage: str) -> tuple[str, ...]:
    return (*STAGES[stage], "-o", OUTPUT[stage])


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks("zstandard", "pyarrow", "scipy.special")
    yield made
    made.close()


@pytest.fixture
def folder(forks: Forks, tmp_path: Path) -> Path:
    """Six prompts with a bad line among them, three replies to each, a script that fails question 3, and what the later
    stages read."""
    write_inputs(tmp_path, 0)
    prepare(forks, tmp_path)
    return tmp_path


def write_inputs(folder: Path, seconds: float) -> None:
    lines = [json.dumps({"id": f"p{i}", "prompt": f"question {i}"}) for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join([*lines[:4], "{", *lines[4:]]))
    write_rows(folder / "samples.jsonl", (sample_row(i, k) for i in range(6) for k in range(3 if i < 2 else 2)))
    rows: list[Json] = [
        {"contains": "question 3", "replies": [""], "scores": [-1.0, -1.0], "seconds": seconds},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0], "seconds": seconds},
    ]
    write_rows(folder / "script.jsonl", rows)


def prepare(forks: Forks, folder: Path) -> None:
    clear(folder, "critiques.jsonl*")
    clear(folder, "shard*")
    first = [(*STAGES["critique"], "-o", "critiques.jsonl")]
    first += [(*STAGES["a shard"][:-1], f"{i}/2", "-o", f"shard{i}.jsonl") for i in (1, 2)]
    for line in first:
        done = forks.run(*line, cwd=folder)
        assert done.code == 0, done


def before(stage: str, forks: Forks, folder: Path) -> None:
    """Prepare the folder for a run."""
    clear(folder)
    if stage == "overwritten":
        assert forks.run(*STAGES["sample"], "-o", "out.jsonl", cwd=folder).code == 0
    if stage.startswith("grown"):
        assert forks.run(*words(stage), "--limit", "2", cwd=folder).code == 0


def assert_whole_or_absent(stage: str, folder: Path, calm: Json, old: Json) -> None:
    """What stands at the output's name is whole; an output that is being replaced is whole, with its manifest and what it
    rejected, at one name or the other."""
    name, now = OUTPUT[stage], files_of(folder)
    assert now.get(name) in (None, calm[name], old.get(name))
    if not old or now.get(name) == calm[name]:
        return
    kept = {file: now.get(f"{file}.old", now.get(file)) for file in old}
    assert kept in (old, {file: calm[file] for file in old})


def kill_at_every(call: str, stage: str, forks: Forks, folder: Path) -> int:
    """How many kills the stage was put to."""
    before(stage, forks, folder)
    old = files_of(folder)
    assert forks.run(*words(stage), cwd=folder).code == 0
    calm = files_of(folder)
    step = 4 if call == "openat" else 1
    for kills in range(400):
        before(stage, forks, folder)
        nth = 1 + kills * step
        killed = forks.run_injected(*words(stage), cwd=folder, inject=f"{call}:signal=SIGKILL:when={nth}")
        if killed.code == 0:
            assert files_of(folder) == calm
            return kills
        assert killed.code == -9
        assert_whole_or_absent(stage, folder, calm, old)
        if stage == "overwritten" and call == "rename":
            forks.run_injected(*words(stage), cwd=folder, inject="write:signal=SIGKILL:when=3")
            assert_whole_or_absent(stage, folder, calm, old)
        again = forks.run(*words(stage), cwd=folder)
        assert again.code == 0, (nth, again)
        assert files_of(folder) == calm, nth
        assert not [path for path in folder.glob("out.jsonl*") if path.is_dir()]
    raise AssertionError("the run never ended")


@needs_strace
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_kill_before_any_sync_or_rename_of_sampling_changes_no_byte(call: str, forks: Forks, folder: Path) -> None:
    assert kill_at_every(call, "sample", forks, folder) >= 4


@needs_strace
@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_before_any_change_of_a_file_changes_no_byte_in_the_end(
    stage: str, forks: Forks, folder: Path, ran: Ran
) -> None:
    kills = {call: kill_at_every(call, stage, forks, folder) for call in CALLS}
    assert kills["fsync"] >= 4
    assert kills["write"] >= 4
    assert kills["rename"] >= 3
    ran(f"{stage}: {sum(kills.values())} kills ({kills})")


@pytest.mark.faults
def test_a_hundred_kills_at_random_moments_change_no_byte_in_the_end(forks: Forks, folder: Path, ran: Ran) -> None:
    write_inputs(folder, 0.005)
    prepare(forks, folder)
    moments, landed = random.Random(6), 0
    for stage in ("sample", "critique", "revise", "critique-revise", "label-prefs"):
        clear(folder)
        started = time.monotonic()
        assert forks.run(*words(stage), cwd=folder).code == 0
        took, calm = time.monotonic() - started, files_of(folder)
        for _ in range(20):
            clear(folder)
            pid = forks.start(*words(stage), cwd=folder)
            time.sleep(moments.uniform(0, took))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            landed += forks.wait().code == -9
            assert_whole_or_absent(stage, folder, calm, {})
            again = forks.run(*words(stage), cwd=folder)
            assert again.code == 0, again
            assert files_of(folder) == calm
    assert landed >= 80
    ran(f"random moments: {landed} of 100 kills before the end")


PIPELINE = """\
name: pipeline
model: scripted:script.jsonl
steps:
  samples: {command: sample, input: prompts.jsonl, n: 2, batch-size: 3, skip-invalid: true}
  preferences: {command: label-prefs, input: "@samples", both-orders: false}
"""


@needs_strace
@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", ["the pipeline alone", "the pipeline or a step"])
@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_kill_of_a_pipeline_or_of_its_steps_changes_no_byte_in_the_end(
    who: str, call: str, forks: Forks, folder: Path, ran: Ran
) -> None:
    (folder / "pipeline.yaml").write_text(PIPELINE)
    pipeline = ("run", "pipeline.yaml", "--out", "out")

    def results() -> Json:
        return {k: v for k, v in files_of(folder / "out", "*").items() if k not in ("run.json", "report.html")}

    assert forks.run(*pipeline, cwd=folder).code == 0
    calm, kills = results(), 0
    for kills in range(60):
        clear(folder, "out")
        inject = f"{call}:signal=SIGKILL:when={1 + kills * (3 if call == 'write' else 1)}"
        killed = forks.run_injected(*pipeline, cwd=folder, inject=inject, children=who != "the pipeline alone")
        if killed.code == 0:
            break
        until(lambda: not held(folder / "out"))
        again = forks.run(*pipeline, cwd=folder)
        assert again.code == 0, again
        assert results() == calm, kills
        state = json.loads((folder / "out/run.json").read_bytes())["steps"]
        assert {step["status"] for step in state.values()} == {"done"}
        assert (folder / "out/report.html").read_bytes().endswith(b"</html>")
    assert kills >= 3
    ran(f"{who}: {kills} kills at {call}")
