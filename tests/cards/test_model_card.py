"""The card of a trained model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import manifest_of, revision, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.models.source import ModelSource

command = stage("sft")

QUICK: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(12)])


def test_the_card_names_model_data_and_license_but_no_folder_of_this_machine(
    model: Path, rows: str, tmp_path: Path
) -> None:
    start = shutil.copytree(model, tmp_path / "start")
    (start / "source.json").write_text('{"license": "Apache-2.0"}')
    command(rows, tmp_path / "first", model=str(start), **QUICK)
    command(rows, tmp_path / "second", model=str(tmp_path / "first"), **QUICK)
    card = (tmp_path / "second/README.md").read_text()
    assert ModelSource.resolve(str(tmp_path / "second")).license == "apache-2.0"
    assert "# sft of first" in card
    assert manifest_of(tmp_path / "second")["provenance"]["input"]["revisions"] in card
    assert str(tmp_path) not in card
