"""One declaration per stage: a frozen config model whose fields declare everything about each option.

The command line, the checks of a run file, the settings in a manifest, the estimate of a plan and `docs/cli.md` all
come from these fields.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cache
from typing import Any, Self

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from cai_cli.common.errors import UsageError


class Effect(StrEnum):
    """How an option affects the output, which decides whether a resumed run may change it."""

    DECIDES = "decides the output"
    HASHED = "recorded by hash"
    HARMLESS = "harmless to a resume"


class Group(StrEnum):
    """The headings of `--help`, in their order."""

    STAGE = "Options of this stage"
    PRINCIPLES = "Principles"
    SAMPLING = "Sampling"
    TRAINING = "Training"
    MODEL = "Model and device"
    SERVER = "Server (openai: models)"
    INPUT = "Input"
    OUTPUT = "Output"
    RAY = "Ray (--executor ray)"


@dataclass(frozen=True)
class Option:
    """What a config field declares beside its type, default, help and bounds.

    Attributes:
        effect: How the option affects the output.
        group: Its heading in `--help`.
        flags: Its flags where they are not `--name` alone: `("--output", "-o")`, or `("--lora/--full",)`.
        aliases: Its names in earlier versions, still read on the command line, in run files and in manifests.
        metavar: The placeholder of its value in `--help`.
        reads_file: Whether it names a file, which a run file gives relative to itself.
        text_or_file: Whether it is a text, or names a file that holds one.
        argument: Whether it is the positional argument.
        run_default: Whether the `model` or `seed` of a run file is its default in the steps.
    """

    effect: Effect = Effect.DECIDES
    group: Group = Group.STAGE
    flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    reads_file: bool = False
    text_or_file: bool = False
    argument: bool = False
    run_default: bool = True


def option(default: Any, help: str, declared: Option | None = None, **bounds: Any) -> Any:
    """A field of a stage config.

    Args:
        default: The default; `...` where the option is required.
        help: The help text, for `--help` and docs/cli.md.
        declared: Everything else; by default an option of the stage that decides the output.
        bounds: The least (`ge`) and the largest (`le`) value of a number.
    """
    return Field(default, description=help, json_schema_extra={"option": declared or Option()}, **bounds)  # type: ignore[dict-item]


class StageConfig(BaseModel):
    """The options of a stage. Its docstring is the help of the command.

    Subclasses add fields with `option(...)` and check what several options together must satisfy in `check`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,  # `cai --help` needs the fields of every stage, but validates none
    )

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_for_switches(cls, value: Any, info: ValidationInfo) -> Any:
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) != is_switch:
            raise ValueError(f"must be {'true or false' if is_switch else 'a value'}, not {value!r}")
        return value

    @field_validator("*")
    @classmethod
    def _counts_fit_an_index(cls, value: Any) -> Any:
        if isinstance(value, int) and value > sys.maxsize:
            raise ValueError(f"must be at most {sys.maxsize}")
        return value

    @classmethod
    def options(cls) -> dict[str, tuple[FieldInfo, Option]]:
        """Each option's field and declaration, by field name."""
        return _options(cls)

    @classmethod
    def option_names(cls) -> dict[str, str]:
        """The field of each option by its name in run files (`max-new-tokens`), old names included."""
        names: dict[str, str] = {}
        for name, (_, declared) in cls.options().items():
            for spelling in (cli_name(name, declared), *declared.aliases):
                names[spelling] = name
        return names

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """The config with these values by field name, checked.

        Args:
            where: What the message starts with, such as `run.yaml: step 'samples': `.

        Raises:
            UsageError: A value is missing, of the wrong type, out of bounds or in conflict with another one.
        """
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            flag = cli_name(name, cls.options()[name][1]) if name in cls.options() else name
            message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if first["type"] == "missing":
                help = cls.model_fields[name].description
                raise UsageError(f"{where}{flag} is missing: {help}", code="missing-option") from None
            given = f", not {first['input']!r}" if "input" in first and "not" not in message else ""
            raise UsageError(f"{where}{flag}: {message}{given}", code="invalid-option") from None
        try:
            config.check()
        except UsageError as error:
            raise UsageError(f"{where}{error.message}", error.hint, code=error.code) from None
        return config

    def check(self) -> None:
        """Check options that depend on one another.

        Raises:
            UsageError: Two options exclude each other, or one needs another.
        """

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output, as a manifest records them.

        Args:
            resolved: Values that replace an option's, such as the format that `auto` resolved to.
        """
        decisive = [name for name, (_, declared) in self.options().items() if declared.effect is Effect.DECIDES]
        return {name: plain(getattr(self, name)) for name in decisive} | resolved


def redefine(config: type[StageConfig], name: str, default: Any, help: str | None = None) -> Any:
    """The field `name` of another config with another default (and help)."""
    field = config.model_fields[name]
    declared = config.options()[name][1]
    return option(default, help or str(field.description), declared, **bounds_of(field))


def bounds_of(field: FieldInfo) -> dict[str, Any]:
    """The bounds of a number by their names, `ge` and `le`."""
    bounds: dict[str, Any] = {}
    for bound in field.metadata:
        bounds |= {"ge": bound.ge} if isinstance(bound, Ge) else {"le": bound.le} if isinstance(bound, Le) else {}
    return bounds


def cli_name(name: str, declared: Option) -> str:
    """The option's name as a run file and the first long flag write it, without dashes in front."""
    flag = next((flag for flag in declared.flags if flag.startswith("--")), f"--{name.replace('_', '-')}")
    return flag.partition("/")[0].removeprefix("--")


@cache
def _options(config: type[StageConfig]) -> dict[str, tuple[FieldInfo, Option]]:
    options: dict[str, tuple[FieldInfo, Option]] = {}
    for name, field in config.model_fields.items():
        extra: Any = field.json_schema_extra
        options[name] = (field, extra["option"])
    return options


def plain(value: Any) -> Any:
    """A value as JSON stores it: an enum member becomes its value."""
    return value.value if isinstance(value, Enum) else value
