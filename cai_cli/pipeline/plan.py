"""From a run file to the steps of a run."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import typer

from cai_cli.common.errors import UsageError
from cai_cli.pipeline.run_file import RunFile
from cai_cli.pipeline.sweep import Value, expand, split_name, split_reference
from cai_cli.runtime.manifest import hash_input

DATA_STAGES = frozenset({"red-team", "sample", "critique", "revise", "critique-revise", "label-prefs", "score"})
EVALUATIONS = frozenset({"eval compare", "eval harm"})
TRAINING_STAGES = frozenset({"sft", "train-pm", "rl"})
PATH_OPTIONS = frozenset({"input", "helpful", "mix", "constitution", "few-shot", "exclude", "votes"})


@dataclass(frozen=True)
class Step:
    """One command of the road. `settings` are its options by name, `files` the hashes of what it reads from outside,
    `needs` the earlier steps it reads from."""

    name: str
    command: str
    output: Path
    settings: Mapping[str, Value | list[Value]]
    files: Mapping[str, str | None]
    needs: Sequence["Step"]

    @property
    def argv(self) -> list[str]:
        """The command line after `cai`."""
        source = self.settings["input"]
        words = [*self.command.split(), *(map(str, source) if isinstance(source, list) else [str(source)])]
        words += ["-o", str(self.output)]
        for name, value in self.settings.items():
            if name == "input" or value is None:
                continue
            option = stage_options()[self.command][name]
            if isinstance(value, bool) and option.is_flag:
                words.append(option.opts[0] if value else option.secondary_opts[0])
            else:
                words += [f"--{name}", str(value)]
        return words

    @property
    def shell(self) -> str:
        return shlex.join(["cai", *self.argv])

    @property
    def key(self) -> str:
        """Changes when this step's settings, its files or any step before it change."""
        parts = [self.argv, dict(self.files), [n.key for n in self.needs]]
        return sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def plan(run: RunFile, file: Path, out: Path) -> list[Step]:
    """The steps in order, sweeps expanded, checked against the options each command has. Raises UsageError."""
    from cai_cli.engines.openai_client import checked_url

    known = stage_options()
    steps: dict[str, Step] = {}
    for name, given in expand(run.steps, takes_many).items():
        where, command = f"{file}: step {name!r}", str(given.get("command"))
        if command not in known:
            raise UsageError(f"{where}: no command {given.get('command')!r}", hint=f"known: {', '.join(sorted(known))}")
        if not isinstance(given.get("input"), str | list):
            raise UsageError(f"{where}: `input` is missing")
        settings = {k: v for k, v in given.items() if k != "command"}
        for shared in ("model", "seed"):
            if shared in known[command]:
                settings.setdefault(shared, getattr(run, shared))
        if isinstance(url := settings.get("base-url"), str):
            checked_url(url)  # before run.json records it
        needs: list[Step] = []
        files: dict[str, str | None] = {}
        for option, value in settings.items():
            if option not in known[command]:
                raise UsageError(
                    f"{where}: `cai {command}` has no option {option!r}",
                    hint=f"it has {', '.join(sorted(known[command]))}",
                )
            if option != "input" and value is not None:
                _check_value(known[command][option], value, f"{where}: {option}")
            found = [
                _located(v, f"{where}: {option}", steps, file.parent if option in PATH_OPTIONS else None)
                for v in (value if isinstance(value, list) else [value])
            ]
            settings[option] = [v for v, _ in found] if isinstance(value, list) else found[0][0]
            needs += [source for _, source in found if isinstance(source, Step)]
            paths = [source for _, source in found if isinstance(source, str)]
            files |= {
                option if len(paths) == 1 else f"{option} {place}": hash_input(path).sha256
                for place, path in enumerate(paths, 1)
            }
        output = out / (name if command in TRAINING_STAGES else f"{name}.jsonl")
        steps[name] = Step(name, command, output, settings, files, needs)
    return list(steps.values())


def _check_value(option: Any, value: Value | list[Value], where: str) -> None:
    """Raises UsageError where the command would refuse `value` for `option`."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: must be true or false, not {value!r}")
        return
    try:
        option.process_value(typer.Context(_command_line()), str(value))
    except typer.BadParameter as error:
        raise UsageError(f"{where}: {error.message}") from None


def _located(
    value: Value, where: str, steps: Mapping[str, Step], folder: Path | None
) -> tuple[Value, Step | str | None]:
    """A setting as the command gets it, and the step or the file it names. `folder`: where its file is looked for."""
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{where}: {value!r} holds a NUL character, which no command line can")
    if reference := split_reference(value):
        name, step = reference
        if step not in steps:
            raise UsageError(f"{where}: no earlier step {step!r}")
        return f"{name}{steps[step].output}", steps[step]
    if folder is None or not isinstance(value, str) or value == "none" or value.startswith("hf://"):
        return value, None
    name, path = ("", value) if (folder / value).exists() else split_name(value)
    path = os.path.relpath(folder / path)
    return f"{name}{path}", path


@cache
def _command_line() -> Any:
    from cai_cli.cli.app import app

    return typer.main.get_command(app)


@cache
def stage_options() -> dict[str, dict[str, Any]]:
    """Stage -> option name (without dashes) -> the option, read off the commands themselves."""
    wired = {"output", "overwrite", "json", "quiet", "help"}
    found = {}
    for name in DATA_STAGES | EVALUATIONS | TRAINING_STAGES:
        command = _command_line()
        for word in name.split():
            command = command.commands[word]
        found[name] = {p.name.replace("_", "-"): p for p in command.params if p.name not in wired}
    return found


def takes_many(command: object) -> frozenset[str]:
    """The options of a command that take several values."""
    return frozenset(name for name, option in stage_options().get(str(command), {}).items() if option.nargs == -1)
