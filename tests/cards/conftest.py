"""Fixtures that several test files of this folder use."""

from pathlib import Path

import pytest
from report_run import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "made", rows=8)
