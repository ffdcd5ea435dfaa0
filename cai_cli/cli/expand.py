"""Typer commands built from stage configs: the fields give the signature, the help and the old names of options."""

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, getdoc
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from cai_cli.common import console
from cai_cli.runtime.config import Group, Option, StageConfig, bounds_of, cli_name
from cai_cli.runtime.output_files import is_stdout
from cai_cli.runtime.stage import Stage

_HEADINGS = {heading: place for place, heading in enumerate(("Arguments", *(group.value for group in Group)))}


def command_from(
    config: type[StageConfig], run: Callable[[Any], Any], *, writes_rows: bool = False
) -> Callable[..., None]:
    """A function for Typer to turn into a command. It builds the config from the options and calls `run` with it.

    Args:
        config: The options; the docstring is the help of the command.
        run: Called with the config.
        writes_rows: Whether rows go to `--output`, which may be stdout.
    """

    def command(**values: Any) -> None:
        console.set_quiet(values["quiet"])
        console.set_rows_on_stdout(writes_rows and is_stdout(values["output"] or ""))
        run(config.build(values))

    parameters = [_parameter(name, *declared) for name, declared in config.options().items()]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = getdoc(config)
    return command


def stage_command(stage: Stage) -> Callable[..., None]:
    """A function for Typer to turn into the command of a stage."""
    return command_from(stage.config, stage.run, writes_rows=not stage.trains)


def _parameter(name: str, field: FieldInfo, declared: Option) -> Parameter:
    shared: dict[str, Any] = {"help": field.description, "metavar": declared.metavar}
    shared |= {"min" if bound == "ge" else "max": limit for bound, limit in bounds_of(field).items()}
    info: Any
    if declared.argument:
        info = typer.Argument(show_default=False, **shared)
    else:
        shared["rich_help_panel"] = declared.group.value
        flags: Any = declared.flags or (f"--{cli_name(name, declared)}",)
        info = typer.Option(*flags, show_default=not field.is_required(), **shared)
    default = Parameter.empty if field.is_required() else field.default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[field.annotation, info])


class GroupedCommand(TyperCommand):
    """A command whose `--help` lists options under headings, and that also reads options under their old names."""

    old_flags: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "MissingParameter":  # typer's; its message says only that the option is missing
                error.message = error.message or getattr(error.param, "help", None) or ""  # type: ignore[attr-defined]
            raise

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        for old, new in self.old_flags.items():
            parser._long_opt[old] = parser._long_opt[new]
        return parser

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                heading = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(heading, []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: _HEADINGS.get(section[0], len(_HEADINGS))):
            with formatter.section(heading):
                formatter.write_dl(records)


def command_class(config: type[StageConfig]) -> type[GroupedCommand]:
    """The class of a command, which knows the old names of its options."""
    old_flags = {
        f"--{alias}": f"--{cli_name(name, declared)}"
        for name, (_, declared) in config.options().items()
        for alias in declared.aliases
    }
    return type("ConfigCommand", (GroupedCommand,), {"old_flags": old_flags})
