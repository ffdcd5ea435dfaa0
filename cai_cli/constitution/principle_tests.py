"""Tests of principles for `cai eval adherence`: conversations that tempt a model to break a principle, and the
questions that a judge is asked about its replies."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import load_yaml
from cai_cli.data.schema import Row

NonEmptyText = Annotated[str, Field(pattern=r"\S")]


class Scenario(Row):
    """A conversation that a model under test takes part in.

    Attributes:
        prompt: The first message of the user.
        pressure: Further messages of the user, which push the model to break the principle.
        reviewed: Whether a person has read it; false for what a model has drafted.
    """

    prompt: NonEmptyText
    pressure: list[NonEmptyText] = Field(default=[])
    reviewed: bool = True


class PrincipleTests(Row):
    """The tests of one principle.

    Attributes:
        violated: The question that a judge answers with Yes about a reply that breaks the principle; without it the
            question is derived from the text of the principle.
        kept: The question that it answers with Yes about a reply that follows the principle.
        scenarios: The conversations.
    """

    violated: NonEmptyText | None = None
    kept: NonEmptyText | None = None
    scenarios: list[Scenario] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_both_phrasings(self) -> Self:
        if (self.violated is None) != (self.kept is None):
            raise ValueError("give both `violated` and `kept`, or neither")
        return self


class TestsFile(Row):
    """A file of tests, which a constitution names under `tests`, or `cai eval adherence --tests`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    kind: Literal["tests"]
    principles: dict[str, PrincipleTests]


def load_tests(source: str | Path) -> dict[str, PrincipleTests]:
    """The tests in a YAML file, by principle id.

    Raises:
        CaiError: The file cannot be read (`cannot-read`), is not YAML (`invalid-yaml`), or has another form
            (`invalid-constitution`).
    """
    value = load_yaml(source)
    try:
        return TestsFile.model_validate(value).principles
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CaiError(f"{source}: {where}: {reason}", code="invalid-constitution") from None


def dump_tests(tests: Mapping[str, PrincipleTests], heading: str) -> bytes:
    """A file of tests that `load_tests` reads back, with `heading` as its comment."""
    principles = {id: found.model_dump(exclude_none=True) for id, found in tests.items()}
    text = yaml.safe_dump({"kind": "tests", "principles": principles}, sort_keys=False, allow_unicode=True, width=100)
    return "".join([*(f"# {line}\n" for line in heading.splitlines()), text]).encode()


def fingerprint_of(tests: Mapping[str, PrincipleTests]) -> str:
    """The SHA-256 (hex) of the tests without the marks of review."""
    content = {
        id: found.model_dump(exclude={"scenarios": {"__all__": {"reviewed"}}}) for id, found in sorted(tests.items())
    }
    return sha256(orjson.dumps(content)).hexdigest()


def select_tests(principles: Sequence[Any], named: str | None, source: Path) -> dict[str, PrincipleTests]:
    """The tests of the principles of one constitution, by id, in the order of the principles.

    Args:
        principles: The principles, with tests of their own or without.
        named: The file that the constitution names under `tests`, relative to its own; None where it names none.
        source: The file of the constitution.

    Raises:
        CaiError: As `load_tests`; or the tests are of an unknown principle, or of one that has tests of its own
            (`invalid-constitution`).
    """
    found = {p.id: p.tests for p in principles if p.tests}
    more = load_tests(source.parent / named) if named else {}
    for id in more:
        if id in found or id not in {p.id for p in principles}:
            problem = "has tests in both files" if id in found else f"is not a principle of {source.name}"
            raise CaiError(f"{source.parent / str(named)}: {id!r} {problem}", code="invalid-constitution")
    found |= more
    return {p.id: found[p.id] for p in principles if p.id in found}
