"""Fixtures that several test files of this folder use."""

from pathlib import Path

import pytest
from helpers import sample_row, write_rows


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(5) for k in range(2)))
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two.", "three."]}])
    return tmp_path
