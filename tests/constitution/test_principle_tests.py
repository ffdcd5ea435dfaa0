"""The tests of principles: the shipped ones, and the files they are read from."""

from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.constitution import schema
from cai_cli.constitution.principle_tests import Scenario, dump_tests, fingerprint_of, load_tests, select_tests

CONSTITUTION = """\
kind: preference
name: own
tests: own.tests.yaml
principles:
  - {id: kind, comparison: "Which is kinder?"}
  - id: brief
    comparison: "Which is shorter?"
    tests: {scenarios: [{prompt: "Tell me all about it.", pressure: ["More!"]}]}
"""
TESTS = """\
kind: tests
principles:
  kind:
    violated: Is the reply unkind?
    kept: Is the reply kind?
    scenarios: [{prompt: "Mock him.", reviewed: false}]
"""


@pytest.mark.parametrize("name", schema.SHIPPED.values())
def test_every_shipped_principle_has_two_questions_and_two_scenarios_with_pressure(name: str) -> None:
    source = schema.shipped_directory() / name
    shipped = schema.load(source)
    tests = select_tests(shipped.principles, shipped.tests, source)
    assert list(tests) == [p.id for p in shipped.principles]
    prompts = [scenario.prompt for found in tests.values() for scenario in found.scenarios]
    assert len(set(prompts)) == len(prompts)
    for found in tests.values():
        assert found.violated
        assert found.kept
        assert len(found.scenarios) >= 2
        assert all(s.reviewed and 1 <= len(s.pressure) <= 2 for s in found.scenarios)


def test_tests_stand_in_the_principle_or_in_the_file_that_the_constitution_names(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(CONSTITUTION)
    (tmp_path / "own.tests.yaml").write_text(TESTS)
    own = schema.load(tmp_path / "own.yaml")
    tests = select_tests(own.principles, own.tests, tmp_path / "own.yaml")
    assert list(tests) == ["kind", "brief"]
    assert tests["kind"].scenarios == [Scenario(prompt="Mock him.", reviewed=False)]
    assert tests["brief"].scenarios[0].pressure == ["More!"]


def test_tests_change_no_prompt_so_they_leave_the_fingerprint_of_a_constitution_alone(tmp_path: Path) -> None:
    with_tests = schema.check(schema.load_yaml(_written(tmp_path, CONSTITUTION)), "own")
    plain = CONSTITUTION.replace("tests: own.tests.yaml\n", "").replace("    tests: {scen", "    # {scen")
    without = schema.check(schema.load_yaml(_written(tmp_path, plain)), "own")
    assert with_tests.fingerprint() == without.fingerprint()


def test_a_review_does_not_change_what_tests_are_run(tmp_path: Path) -> None:
    drafted = load_tests(_written(tmp_path, TESTS))
    reviewed = load_tests(_written(tmp_path, TESTS.replace(", reviewed: false", "")))
    assert fingerprint_of(drafted) == fingerprint_of(reviewed)
    assert fingerprint_of(drafted) != fingerprint_of(load_tests(_written(tmp_path, TESTS.replace("Mock", "Hug"))))


def test_a_file_of_tests_reads_back(tmp_path: Path) -> None:
    tests = load_tests(_written(tmp_path, TESTS))
    (tmp_path / "back.yaml").write_bytes(dump_tests(tests, "Two lines\nof comment"))
    assert load_tests(tmp_path / "back.yaml") == tests


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    kept: Is the reply kind?\n", ""),
        ("  kind:\n", "  unknown:\n"),
        ("  kind:\n", "  brief:\n"),
        ("Mock him.", " "),
        ("kind: tests", "kind: preference"),
    ],
)
def test_tests_that_are_not_complete_or_of_no_principle_are_refused(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "own.yaml").write_text(CONSTITUTION)
    (tmp_path / "own.tests.yaml").write_text(TESTS.replace(old, new))
    own = schema.load(tmp_path / "own.yaml")
    with pytest.raises(CaiError) as refused:
        select_tests(own.principles, own.tests, tmp_path / "own.yaml")
    assert refused.value.code == "invalid-constitution"


def _written(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path
