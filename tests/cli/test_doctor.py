"""`cai doctor` names what is missing and how to fix it."""

import json
from pathlib import Path

import pytest
from conftest import Cai

from cai_cli import __version__
from cai_cli.cli.doctor import unmet


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


def test_versions_that_do_not_fit_vllm_are_named() -> None:
    requirements = [
        "torch==2.13.0",
        "transformers<5.23,>=5.10",
        'vllm<=0.31.0,>=0.22.0; extra == "vllm"',
        'torch>=9; extra == "other"',
        "numba",
    ]
    assert unmet(requirements, {"torch": "2.13.0+cpu", "transformers": "5.22.1", "vllm": "0.30.0"}) == []
    assert unmet(requirements, {"torch": "2.12.0", "transformers": "5.23.0", "vllm": "0.32.0"}) == [
        "torch must be ==2.13.0, not 2.12.0",
        "transformers must be <5.23,>=5.10, not 5.23.0",
        "vllm must be <=0.31.0,>=0.22.0, not 0.32.0",
    ]
