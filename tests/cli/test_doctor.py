"""`cai doctor` names what is missing and how to fix it."""

import json
from pathlib import Path

import pytest
from conftest import Cai

from cai_cli import __version__


def test_doctor_names_what_is_missing_and_the_command_that_fixes_it(
    cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    found = json.loads(cai("doctor", "--json").stdout)
    checks = {c["name"]: c for c in found["checks"]}
    assert checks["cai"]["found"] == __version__
    assert checks["torch"]["ok"]
    assert checks["principles/preference.yaml"]["found"].startswith("16 principles")
    model = checks["model smollm2-135m"]
    assert (model["ok"], model["fix"]) == (False, "cai models fetch smollm2-135m")
    assert not found["ok"]
    text = cai("doctor").stdout
    assert "fix: cai models fetch smollm2-135m" in text
    assert text.count("\nok ") + text.count("\n-- ") + 1 == len(found["checks"])
