"""Options of judging that contradict each other are refused."""

from pathlib import Path

import pytest
from conftest import Cai
from helpers import sample_row, write_rows


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "guess"],
        ["--pairs", "some"],
        ["--clamp", "0.6,0.9"],
        ["--clamp", "x"],
        ["--principles-per-pair", "0"],
        ["--principles-per-pair", "17"],
        ["--cot-samples", "2"],
        ["--method", "cot", "--calibrate"],
        ["--method", "contrast", "--few-shot", "examples.yaml"],
    ],
)
def test_an_invalid_way_of_judging_is_a_usage_error(words: list[str], cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(1, k) for k in range(2)])
    refused = cai("label-prefs", "samples.jsonl", "--model", "scripted:none", "-o", "prefs.jsonl", *words)
    assert refused.code == 2
    assert not (tmp_path / "prefs.jsonl").exists()
