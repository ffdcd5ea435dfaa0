"""`cai principles` lists, shows and validates."""

from pathlib import Path

import pytest
from conftest import Cai

SMALL = """\
kind: critique-revision
name: small
principles:
  - {id: a, theme: harm, critique: "Look: {here}.", revision: Rewrite it.}
  - {id: b, critique: Look there., revision: Do it again.}
examples:
  - messages: [{role: user, content: "why?"}, {role: assistant, content: because.}]
    critique_request: Any harm?
    critique: None.
    revision_request: Redo it.
    revision: Because of this.
"""
COMPARE = """\
kind: preference
name: compare
principles: [{id: c, comparison: "Which is kinder?"}]
examples:
  - {messages: [{role: user, content: "who?"}], options: [me, you], answer: A}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    (tmp_path / "compare.yaml").write_text(COMPARE)
    return path


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
