"""Fixtures that several test files of this folder use."""

from pathlib import Path

import pytest


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"question number {i}\n" for i in range(48)))
    return str(file)
