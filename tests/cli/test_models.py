"""`cai models`: what is listed, and what is downloaded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cai_cli.cli import models
from cai_cli.common.errors import CaiError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_models_list_shows_license_and_size_and_whether_it_is_here(cache: Path) -> None:
    shown = CliRunner().invoke(models.app, ["list"])
    assert shown.exit_code == 0
    line = next(line for line in shown.stdout.splitlines() if line.startswith("smollm2-135m"))
    assert ("Apache-2.0" in line, "93 MB" in line, "not fetched" in line) == (True, True, True)
    (row,) = json.loads(CliRunner().invoke(models.app, ["list", "--json"]).stdout)
    assert (row["name"], row["license"], row["path"]) == ("smollm2-135m", "Apache-2.0", None)
    assert not cache.exists()


@pytest.mark.usefixtures("offline_hub")
def test_models_path_downloads_nothing_and_names_the_command_that_does(cache: Path) -> None:
    for name in ("smollm2-135m", "some/model"):
        error = CliRunner().invoke(models.app, ["path", name]).exception
        assert isinstance(error, CaiError)
        assert "not fetched yet" in error.message
        assert error.hint == f"cai models fetch {name}"
    assert not cache.exists()
