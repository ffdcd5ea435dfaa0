"""Fixtures that several test files of this folder use."""

from pathlib import Path

import pytest
from helpers import write_rows
from pipeline_cases import PIPELINE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(6)))
    (tmp_path / "helpful.txt").write_text("how?\nwhy?\n")
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]}])
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path
