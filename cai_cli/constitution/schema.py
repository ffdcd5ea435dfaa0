"""The constitution: principles and few-shot examples in YAML files, and their schema."""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import load_yaml
from cai_cli.constitution.principle_tests import PrincipleTests
from cai_cli.data.reward_schema import MAX_WEIGHT
from cai_cli.data.schema import Message, Row

SHIPPED = {"critique-revision": "critique_revision.yaml", "preference": "preference.yaml"}
NonEmptyText = Annotated[str, Field(min_length=1)]


class CritiquePrinciple(Row):
    """A principle for critiques and revisions (paper section 3.1).

    Attributes:
        id: Unique in the constitution.
        theme: What the principle is about.
        critique: The request to criticise the last reply.
        revision: The request to revise it.
        tests: Its tests (`cai eval adherence`); a constitution may name a file of them instead.
    """

    id: NonEmptyText
    theme: str | None = None
    critique: NonEmptyText
    revision: NonEmptyText
    tests: PrincipleTests | None = None


class PreferencePrinciple(Row):
    """A principle for the choice between two replies (paper section 4.1).

    Attributes:
        id: Unique in the constitution.
        theme: What the principle is about.
        comparison: The question that asks for the better reply.
        following: A system prompt for an assistant that follows the principle (`label-prefs --method contrast`).
        breaking: A system prompt for an assistant that breaks it.
        weight: Its weight where replies are rewarded under all principles (`rl --judge`, `serve-reward`).
        tests: Its tests, as for a `CritiquePrinciple`.
    """

    id: NonEmptyText
    theme: str | None = None
    comparison: NonEmptyText
    following: NonEmptyText | None = None
    breaking: NonEmptyText | None = None
    weight: float = Field(default=1.0, ge=0, le=MAX_WEIGHT, allow_inf_nan=False)
    tests: PrincipleTests | None = None


class CritiqueExample(Row):
    """A few-shot example of a critique and a revision.

    Attributes:
        messages: A conversation that ends with the reply to criticise.
        critique_request: The request for the critique.
        critique: The critique.
        revision_request: The request for the revision.
        revision: The revised reply.
    """

    messages: list[Message] = Field(min_length=2)
    critique_request: NonEmptyText
    critique: NonEmptyText
    revision_request: NonEmptyText
    revision: NonEmptyText

    @model_validator(mode="after")
    def _ends_with_the_assistant(self) -> Self:
        if self.messages[-1].role != "assistant":
            raise ValueError("messages must end with the assistant reply that is criticised")
        return self


class ComparisonExample(Row):
    """A few-shot example of a comparison of two replies.

    Attributes:
        messages: The conversation that both replies continue.
        comparison: The question; null for the question of a drawn principle.
        options: The two replies.
        answer: The letter of the better one.
        rationale: The chain of thought that leads to the answer.
        preamble: The opening line of a published chain-of-thought prompt, if it differs from the default.
    """

    messages: list[Message] = Field(min_length=1)
    comparison: str | None = None
    options: list[NonEmptyText] = Field(min_length=2, max_length=2)
    answer: Literal["A", "B"]
    rationale: str | None = None
    preamble: str | None = None


class _File(BaseModel):
    """What both kinds of constitution have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: NonEmptyText
    license: str | None = None
    description: str | None = None
    tests: NonEmptyText | None = None  # a file beside this one

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [p.id for p in getattr(self, "principles", [])]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"principle id {name!r} occurs twice")
        return self

    def fingerprint(self) -> str:
        """The SHA-256 (hex) of everything that affects prompts, so without name, description, license and tests."""
        content = self.model_dump(exclude={"name", "license", "description", "tests"})
        content = _without_default_weights(content)
        for principle in content["principles"]:
            del principle["tests"]
        return sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


class CritiqueConstitution(_File):
    """A constitution for critiques and revisions (paper section 3)."""

    kind: Literal["critique-revision"]
    principles: list[CritiquePrinciple] = []
    examples: list[CritiqueExample] = []


class PreferenceConstitution(_File):
    """A constitution for preference labels (paper section 4)."""

    kind: Literal["preference"]
    principles: list[PreferencePrinciple] = []
    examples: list[ComparisonExample] = []


AnyConstitution = CritiqueConstitution | PreferenceConstitution
C = TypeVar("C", CritiqueConstitution, PreferenceConstitution)


def shipped_directory() -> Path:
    """The directory of the shipped constitutions: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "principles"
    return installed if installed.is_dir() else package.parent / "principles"


def load(source: str | Path) -> AnyConstitution:
    """The constitution in a YAML file.

    Raises:
        CaiError: The file cannot be read (`cannot-read`), is not YAML (`invalid-yaml`), or is not a valid constitution
            (`invalid-constitution`). The message names the file and the first problem.
    """
    return check(load_yaml(source), str(source))


def check(value: object, name: str) -> AnyConstitution:
    """A parsed YAML document as a constitution; `name` names it in errors.

    Raises:
        CaiError: The document is not a valid constitution (`invalid-constitution`).
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    models: dict[object, type[AnyConstitution]] = {
        "critique-revision": CritiqueConstitution,
        "preference": PreferenceConstitution,
    }
    if not isinstance(kind, str) or kind not in models:
        raise CaiError(f"{name}: `kind` must be one of {', '.join(SHIPPED)}, not {kind!r}", code="invalid-constitution")
    try:
        return models[kind].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CaiError(f"{name}: {where}: {reason}", code="invalid-constitution") from None


def open_constitution(model: type[C], source: str | None, few_shot: str | None) -> C:
    """The constitution that a stage uses.

    Args:
        model: The kind of constitution that the stage needs.
        source: The file of `--constitution`; None is the shipped one.
        few_shot: The file of `--few-shot`, whose examples replace those of the constitution; "none" for no examples;
            None keeps those of the constitution.

    Raises:
        CaiError: A file is of the other kind or has no principles or examples (`invalid-constitution`), or as `load`.
    """
    kind = model.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    loaded = load(source or shipped_directory() / SHIPPED[kind])
    if not isinstance(loaded, model):
        raise CaiError(
            f"{source} holds {loaded.kind} principles, this stage needs {kind} principles", code="invalid-constitution"
        )
    if not loaded.principles:
        raise CaiError(
            f"{source} holds no principles",
            hint="a file with examples only belongs to --few-shot",
            code="invalid-constitution",
        )
    if few_shot == "none":
        return loaded.model_copy(update={"examples": []})
    if few_shot is not None:
        extra = load(few_shot)
        if not isinstance(extra, model) or not extra.examples:
            raise CaiError(f"{few_shot} holds no {kind} examples", code="invalid-constitution")
        return loaded.model_copy(update={"examples": extra.examples})
    return loaded


def dump(constitution: AnyConstitution) -> str:
    """YAML text that `load` reads back as the same constitution."""
    value = _without_nulls(_without_default_weights(constitution.model_dump()))
    ordered = {"kind": value.pop("kind"), **value}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


def _without_default_weights(content: dict[str, Any]) -> dict[str, Any]:
    """The content without weights of 1, which version 0.1.0 did not have: its fingerprints stay valid."""
    principles = [{k: v for k, v in p.items() if (k, v) != ("weight", 1.0)} for p in content["principles"]]
    return content | {"principles": principles}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
