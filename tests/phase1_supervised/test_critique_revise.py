"""`cai critique-revise` gives the rows of its single stages."""

from pathlib import Path

from conftest import Cai

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
