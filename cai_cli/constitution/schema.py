"""The constitution: principles and few-shot examples in plain YAML; the published JSON as it is; the seeded draw."""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import load_yaml
from cai_cli.data.schema import Message, Row

SHIPPED = {"critique-revision": "critique_revision.yaml", "preference": "preference.yaml"}
NonEmptyText = Annotated[str, Field(min_length=1)]


class CritiquePrinciple(Row):
    """Paper section 3.1: a request to criticise the last reply, and the request to revise it accordingly."""

    id: NonEmptyText
    theme: str | None = None
    critique: NonEmptyText
    revision: NonEmptyText


class PreferencePrinciple(Row):
    """Paper section 4.1: by what to choose between two replies. `following` and `breaking` tell a model how to speak
    so that it would win or lose by this principle (`label-prefs --method contrast`)."""

    id: NonEmptyText
    theme: str | None = None
    comparison: NonEmptyText
    following: NonEmptyText | None = None
    breaking: NonEmptyText | None = None


class CritiqueExample(Row):
    """A worked critique and revision; `messages` end with the reply that is criticised."""

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
    """A worked comparison. A null `comparison` takes the principle that is being asked about; `preamble` is the
    opening line of a published chain-of-thought prompt where it is not ours."""

    messages: list[Message] = Field(min_length=1)
    comparison: str | None = None
    options: list[NonEmptyText] = Field(min_length=2, max_length=2)
    answer: Literal["A", "B"]
    rationale: str | None = None
    preamble: str | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: NonEmptyText
    license: str | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [p.id for p in getattr(self, "principles", [])]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"principle id {name!r} stands twice")
        return self

    def fingerprint(self) -> str:
        """Hash of everything that decides prompts; description and license do not."""
        content = self.model_dump(exclude={"name", "license", "description"})
        return sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


class CritiqueConstitution(_File):
    kind: Literal["critique-revision"]
    principles: list[CritiquePrinciple] = []
    examples: list[CritiqueExample] = []


class PreferenceConstitution(_File):
    kind: Literal["preference"]
    principles: list[PreferencePrinciple] = []
    examples: list[ComparisonExample] = []


AnyConstitution = CritiqueConstitution | PreferenceConstitution
C = TypeVar("C", CritiqueConstitution, PreferenceConstitution)


def shipped_directory() -> Path:
    """Where the shipped YAML lies: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "principles"
    return installed if installed.is_dir() else package.parent / "principles"


def load(source: str | Path) -> AnyConstitution:
    """Read and check one YAML file. Raises CaiError naming the file and the first thing that is wrong."""
    return check(load_yaml(source), str(source))


def check(value: object, name: str) -> AnyConstitution:
    """A parsed YAML document as a constitution. Raises CaiError."""
    kind = value.get("kind") if isinstance(value, dict) else None
    models: dict[object, type[AnyConstitution]] = {
        "critique-revision": CritiqueConstitution,
        "preference": PreferenceConstitution,
    }
    if not isinstance(kind, str) or kind not in models:
        raise CaiError(f"{name}: `kind` must be one of {', '.join(SHIPPED)}, not {kind!r}")
    try:
        return models[kind].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CaiError(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def open_constitution(model: type[C], source: str | None, few_shot: str | None) -> C:
    """The constitution a stage works under: `--constitution` (or the shipped one) with the examples of `--few-shot`.

    Raises CaiError when a file is of the other kind or holds no principles.
    """
    kind = model.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    loaded = load(source or shipped_directory() / SHIPPED[kind])
    if not isinstance(loaded, model):
        raise CaiError(f"{source} holds {loaded.kind} principles, this stage needs {kind} principles")
    if not loaded.principles:
        raise CaiError(f"{source} holds no principles", hint="examples alone go to --few-shot")
    if few_shot == "none":
        return loaded.model_copy(update={"examples": []})
    if few_shot is not None:
        extra = load(few_shot)
        if not isinstance(extra, model) or not extra.examples:
            raise CaiError(f"{few_shot} holds no {kind} examples")
        return loaded.model_copy(update={"examples": extra.examples})
    return loaded


def dump(constitution: AnyConstitution) -> str:
    """YAML text that `load` reads back as the same constitution."""
    value = _without_nulls(constitution.model_dump())
    ordered = {"kind": value.pop("kind"), **value}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
