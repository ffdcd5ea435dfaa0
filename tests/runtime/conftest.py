"""Fixtures that several test files of this folder use."""

from pathlib import Path

import pytest
from helpers import sample_row, write_rows


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Ten prompts, two replies to each, and a script that fails question 3 and ties or refuses nothing else."""
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(10)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(10) for k in range(2)))
    script = [
        {"contains": "question 3", "replies": [""]},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]},
    ]
    write_rows(tmp_path / "script.jsonl", script)
    return tmp_path
