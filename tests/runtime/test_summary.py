"""The summary of a run on stderr, as JSON, or not at all."""

import json
from pathlib import Path

from conftest import Cai
from helpers import manifest_of
from stage_cases import ALL, WORDS


def test_json_prints_one_object_and_it_is_the_manifest_in_short(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "out.jsonl", "--json")
    summary = json.loads(done.stdout)
    assert done.stderr == ""
    counts = manifest_of(inputs / "out.jsonl")["counts"]
    assert {k: summary[k] for k in counts} == counts
    assert (summary["stage"], summary["status"], summary["output"]) == ("sample", "finished", "out.jsonl")
    again = json.loads(cai(*WORDS["sample"], "-o", "out.jsonl", "--json").stdout)
    assert {**again, "status": "finished"} == summary


def test_json_goes_to_stderr_where_rows_go_to_stdout(cai: Cai, inputs: Path) -> None:
    done = cai("sample", "prompts.jsonl", *ALL, "--limit", "3", "--json")
    assert len(done.stdout.splitlines()) == 3
    assert json.loads(done.stderr)["out"] == 3


def test_quiet_prints_nothing(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "out.jsonl", "--quiet")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
