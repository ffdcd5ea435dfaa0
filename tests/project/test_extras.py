"""The extras of pyproject.toml resolve beside the versions that this environment has."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_extra_resolves_beside_the_installed_torch_and_transformers(tmp_path: Path) -> None:
    extras = ",".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--quiet"]
    report = tmp_path / "report.json"
    done = subprocess.run([*pip, "--report", report, f"{ROOT}[{extras}]"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    installed = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    assert installed["vllm"].startswith("0.30.")
    for package in ("torch", "transformers", "trl"):
        assert installed.get(package, version(package)) == version(package)
