"""Training prints the messages of cai only."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import revision, stage, write_rows
from tiny import tiny_model_dir

command = stage("sft")

QUICK: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(12)])


def test_only_messages_of_cai_are_printed_and_the_summary_counts_every_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(30)] + [revision(30, "long " * 300)])
    command(rows, tmp_path / "out", model=str(model), **QUICK | {"eval_share": 0.1})
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    counted = "31 in = 30 used (27 trained on + 3 held out) + 1 rejected (1 longer than the model's window of 512)"
    assert line.startswith(f"sft: {counted}")
    command(rows, tmp_path / "out", model=str(model), quiet=True, as_json=True, overwrite=True, **QUICK)
    captured = capsys.readouterr()
    assert captured.err == ""
    summary = json.loads(captured.out)
    assert summary["in"] == summary["used"] + summary["rejected"] + summary["skipped"] == 31
