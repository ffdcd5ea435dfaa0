"""Rows on stdout, in pipes and on devices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai
from helpers import rows_in
from stage_cases import ALL, WORDS


def test_rows_on_stdout_are_the_rows_of_the_file_and_what_is_rejected_is_shown_whole(cai: Cai, inputs: Path) -> None:
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    piped = cai(*WORDS["sample"], "-o", "-", "--quiet")
    assert piped.stdout.encode() == (inputs / "out.jsonl").read_bytes()
    shown = [json.loads(line.split("rejected: ", 1)[1]) for line in piped.stderr.splitlines()]
    assert shown == rows_in(inputs / "out.jsonl.rejected.jsonl")


@pytest.mark.parametrize("stage", ["sample", "label-prefs"])
def test_dev_stdout_is_stdout_and_dev_null_takes_the_rows_without_sidecars(stage: str, cai: Cai, inputs: Path) -> None:
    piped = cai(*WORDS[stage], "-o", "-")
    assert piped.stdout.count("\n") > 1
    named = cai(*WORDS[stage], "-o", "/dev/stdout", "--json")
    assert (named.code, named.stdout) == (0, piped.stdout)
    lines = named.stderr.splitlines()
    assert json.loads(lines.pop() if stage == "sample" else next(x for x in lines if x.startswith("{")))["out"] > 1
    for _ in range(2):  # nothing is finished already
        null = cai(*WORDS[stage], "-o", "/dev/null", "--overwrite")
        assert (null.code, null.stdout) == (0, "")
        assert null.stderr.count("warning: rejected: ") == piped.stderr.count("warning: rejected: ") > 0
    assert Path("/dev/null").is_char_device()
    assert not [p for p in Path("/dev").iterdir() if p.name.startswith(("null.", "stdout."))]


def test_a_named_pipe_takes_the_rows(inputs: Path) -> None:
    line = f"{sys.executable} -m cai_cli sample prompts.jsonl {' '.join(ALL)} -o >(cat > rows.jsonl); wait $!"
    subprocess.run(["bash", "-c", line], cwd=inputs, capture_output=True, text=True, check=True, timeout=60)
    assert len(rows_in(inputs / "rows.jsonl")) == 9


def test_a_device_that_takes_no_bytes_is_an_error(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "/dev/full")
    assert (done.code, done.error) == (1, "cannot-write")


@pytest.mark.parametrize("command", ["sort", "dedup"])
def test_sorted_rows_go_to_streams_too(command: str, cai: Cai, inputs: Path) -> None:
    assert cai(command, "prompts.jsonl", "-o", "out.jsonl").code == 0
    assert cai(command, "prompts.jsonl", "-o", "/dev/stdout").stdout.encode() == (inputs / "out.jsonl").read_bytes()
    assert cai(command, "prompts.jsonl", "-o", "/dev/null").code == 0
