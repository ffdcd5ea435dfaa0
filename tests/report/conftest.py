"""Fixtures that several test files of this folder use."""

import pytest
from report_page import Page, drawn
from report_run import make_run


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return drawn(make_run(tmp_path_factory.mktemp("r") / "made"))
