"""`cai principles` lists, shows and validates."""

from pathlib import Path

from conftest import Cai


def test_the_principles_command_lists_shows_and_validates(cai: Cai, small: Path) -> None:
    assert cai("principles", "list", "small.yaml").stdout.split() == [
        "critique-revision",
        "a",
        "harm",
        "critique-revision",
        "b",
    ]
    shown = cai("principles", "show", "a", "--constitution", "small.yaml")
    assert shown.stdout == "a  [harm]\n  critique: Look: {here}.\n  revision: Rewrite it.\n"
    missing = cai("principles", "show", "a", "z", "--constitution", "small.yaml")
    assert (missing.code, missing.error) == (1, "unknown-principle")
    valid = cai("principles", "validate", "small.yaml", "compare.yaml")
    assert valid.stdout.splitlines() == [
        "small.yaml: ok, critique-revision, 2 principles, 1 examples",
        "compare.yaml: ok, preference, 1 principles, 1 examples",
    ]
