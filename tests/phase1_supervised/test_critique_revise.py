"""`cai critique-revise` gives the rows of its single stages."""

import json
from pathlib import Path

from conftest import Cai
from helpers import manifest_of, rows_in, write_rows

# --- commands ---------------------------------------------------------------------------------------------------------


def test_chained_single_rounds_give_the_same_rows_as_the_loop(cai: Cai, inputs: Path) -> None:
    model = ("--model", "scripted:script.jsonl")
    for stage, source, out in (
        ("critique", "samples", "c1"),
        ("revise", "c1", "r1"),
        ("critique", "r1", "c2"),
        ("revise", "c2", "r2"),
    ):
        assert cai(stage, f"{source}.jsonl", "-o", f"{out}.jsonl", *model).code == 0
    assert cai("critique-revise", "samples.jsonl", "-o", "loop.jsonl", "--rounds", "2", *model).code == 0
    assert (inputs / "r2.jsonl").read_bytes() == (inputs / "loop.jsonl").read_bytes()
    assert cai("critique-revise", "r1.jsonl", "-o", "on.jsonl", "--rounds", "1", *model).code == 0
    assert (inputs / "on.jsonl").read_bytes() == (inputs / "loop.jsonl").read_bytes()


def test_replies_and_revisions_that_were_cut_off_are_counted_in_each_round(cai: Cai, inputs: Path) -> None:
    samples = rows_in(inputs / "samples.jsonl")
    write_rows(inputs / "samples.jsonl", [row | {"finish_reason": "length"} for row in samples[:3]] + samples[3:])
    write_rows(inputs / "cut.jsonl", [{"replies": ["and so"], "finish_reason": "length"}])
    first = cai("critique-revise", "samples.jsonl", "-o", "one.jsonl", "--rounds", "1", "--model", "scripted:cut.jsonl")
    assert "3 of 10 replies and 10 of 10 revisions cut off at the length limit" in first.stderr
    words = ("critique-revise", "one.jsonl", "--rounds", "1", "--model", "scripted:script.jsonl", "--json")
    ends = {
        "replies": {"whole": 7, "cut_off": 3, "unknown": 0},
        "revisions": {"whole": 10, "cut_off": 10, "unknown": 0},
    }
    for _ in range(2):  # the second time it is finished already
        assert json.loads(cai(*words, "-o", "two.jsonl").stdout)["reply_ends"] == ends
    assert manifest_of(inputs / "two.jsonl")["reply_ends"] == ends
    assert json.loads(cai(*words).stderr)["reply_ends"] == ends
    (row, *_) = rows_in(inputs / "two.jsonl")
    assert [each["finish_reason"] for each in row["history"]] == ["length", "length"]
    assert row["finish_reason"] == "stop"
