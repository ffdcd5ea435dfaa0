"""Connecting to a Ray cluster."""

import sys
from pathlib import Path

import pytest
from conftest import Cai


def test_a_wrong_address_is_an_error_at_once(cai: Cai, folder: Path) -> None:
    pytest.importorskip("ray")
    for address, code in (
        ("127.0.0.1:1", "server-unreachable"),
        ("h", "invalid-option"),
        ("ray://h:1", "invalid-option"),
    ):
        assert cai("run", "pipeline.yaml", "--executor", "ray", "--address", address).error == code


def test_a_missing_ray_is_named(cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cai("run", "pipeline.yaml", "--executor", "ray").error == "missing-dependency"
