"""Turns a run file into the steps of a run: expands sweeps, resolves references and checks every option."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.constitution.schema import SHIPPED
from cai_cli.judging.labeller import JudgeOptions
from cai_cli.pipeline import registry
from cai_cli.pipeline.registry import takes_many
from cai_cli.pipeline.rounds import Ending, expand_rounds
from cai_cli.pipeline.run_file import RunFile
from cai_cli.pipeline.sweep import Value, expand, split_name, split_reference
from cai_cli.runtime.config import StageConfig
from cai_cli.runtime.manifest import hash_input
from cai_cli.runtime.stage import Stage

SET_BY_RUN = frozenset({"output", "overwrite", "json", "quiet"})
MODELS = frozenset({"model", "pm", "judge", "monitor-pm", "monitor-judge"})  # options that name a model
KEY_FORMAT = "2:"  # keys of version 0.1.0 have no prefix


@dataclass(frozen=True)
class Step:
    """One command of a pipeline.

    Attributes:
        name: Its name in the run file; for a variant of a sweep, with its value.
        stage: The stage that it runs.
        output: The file or directory it writes.
        settings: Its options by their names in a run file; null leaves an option at its default.
        files: Hashes of the files outside the run that it reads, by option.
        needs: The earlier steps whose outputs it reads.
    """

    name: str
    stage: Stage
    output: Path
    settings: Mapping[str, Value | list[Value]]
    files: Mapping[str, str | None]
    needs: Sequence["Step"]

    @property
    def command(self) -> str:
        """The subcommand, such as `eval compare`."""
        return self.stage.name

    @cached_property
    def config(self) -> Any:
        """The options as the stage takes them. Raises UsageError where one is invalid."""
        fields = self.stage.config.option_names()
        values: dict[str, Any] = {fields[name]: value for name, value in self.settings.items() if value is not None}
        return self.stage.config.build(values | {"output": str(self.output)}, where=f"step {self.name!r}: ")

    @property
    def argv(self) -> list[str]:
        """The command line after `cai`."""
        return self.command_line(self.output)

    def command_line(self, output: Path) -> list[str]:
        """The command line after `cai`, with another output."""
        fields, options = self.stage.config.option_names(), self.stage.config.options()
        arguments = [name for name, field in fields.items() if options[field][1].argument and name in self.settings]
        words = self.command.split()
        for value in (self.settings[name] for name in arguments):
            words += map(str, value) if isinstance(value, list) else [str(value)]
        words += ["-o", str(output)]
        for name, value in self.settings.items():
            if name in arguments or value is None:
                continue
            if isinstance(value, bool):
                _, declared = options[fields[name]]
                on, _, off = (declared.flags[0] if declared.flags else f"--{name}").partition("/")
                words += [on] if value else [off] if off else []
            else:
                for one in value if isinstance(value, list) else [value]:
                    words += [f"--{name}", str(one)]
        return words

    @property
    def shell(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(["cai", *self.argv])

    @cached_property
    def key(self) -> str:
        """A hash that changes when the settings or files of this step or of an earlier step that it needs change."""
        parts = [self.argv, dict(self.files), [need.key for need in self.needs]]
        return KEY_FORMAT + sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def plan(run: RunFile, file: Path, out: Path, endings: Mapping[str, Ending] | None = None) -> list[Step]:
    """The steps of a run.

    Args:
        run: The run file.
        file: Where it was read from; files in it are relative to it.
        out: The run folder.
        endings: Where the blocks of rounds end that have ended early, by name.

    Returns:
        The steps in order.

    Raises:
        UsageError: A step names an unknown command, option, step or value.
    """
    steps: dict[str, Step] = {}
    with _named(f"{file}: "):
        rounds = expand_rounds(run.steps, run.model, run.seed, endings or {})
        with_constitution = {name: _with_constitution(given, run.constitution) for name, given in rounds.items()}
        variants = expand(with_constitution, takes_many, {"constitution": run.constitution})
    for name, given in variants.items():
        with _named(f"{file}: step {name!r}: "):
            steps[name] = _plan_step(name, given, steps, _RunPaths(run, file, out))
    return list(steps.values())


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put the place in the run file before the message of an error, which may come from any check of an option."""
    try:
        yield
    except CaiError as error:
        error.message = f"{place}{error.message}"
        raise


def _with_constitution(given: Mapping[str, Any], constitution: Any) -> dict[str, Any]:
    """The settings of a step, with the constitution of the run where the step asks a model about principles."""
    stage = registry.STAGES.get(str(given.get("command")))
    names = stage.config.option_names() if stage else {}
    # Optional in some stages: `rl` needs a judge for it, `sample` a contrast.
    asks = "constitution" in names and all(given.get(name) for name in ("judge", "contrast") if name in names)
    return {**({"constitution": constitution} if asks and constitution else {}), **given}


@dataclass(frozen=True)
class _RunPaths:
    """The run file, where it was read from, and the run folder."""

    run: RunFile
    file: Path
    out: Path


def _plan_step(name: str, given: Mapping[str, Any], steps: Mapping[str, Step], place: _RunPaths) -> Step:
    stage = registry.STAGES.get(str(given.get("command")))
    if stage is None:
        known = ", ".join(sorted(registry.STAGES))
        raise UsageError(f"unknown command {given.get('command')!r}", hint=f"known: {known}", code="unknown-option")
    if not isinstance(given.get("input"), str | list) or not given["input"]:
        raise UsageError("`input` is missing", code="missing-option")
    settings = _with_current_names(given, stage)
    fields = stage.config.option_names()
    for shared in ("model", "seed"):
        if shared in fields and stage.config.options()[fields[shared]][1].run_default:
            settings.setdefault(shared, getattr(place.run, shared))
    for address in ("base-url", "pm-url", "judge-url"):
        _check_urls(settings.get(address), f"--{address}")
    needs: list[Step] = []
    files: dict[str, str | None] = {}
    lists = takes_many(stage.name) & {"constitution", "input"}
    for option, value in settings.items():
        folder = place.file.parent if _reads_file(stage.config, option, value, place.file.parent) else None
        values = value if isinstance(value, list) else [value]
        if option == "constitution":
            values = _constitution_files(values, stage, place.file.parent)
        with _named(f"{option}: "):
            resolved = [_resolve(one, steps, folder) for one in values]
        is_list = isinstance(value, list) or option in lists
        settings[option] = [v for v, _ in resolved] if is_list else resolved[0][0]
        if option in MODELS and folder is None and isinstance(settings[option], str):
            settings[option] = _model_beside(str(settings[option]), place.file.parent)
        needs += [source for _, source in resolved if isinstance(source, Step)]
        paths = [source for _, source in resolved if isinstance(source, str)]
        files |= {
            option if len(paths) == 1 else f"{option} {number}": hash_input(path).sha256
            for number, path in enumerate(paths, 1)
        }
    output = place.out / (name if stage.trains else f"{name}.jsonl")
    by_field: dict[str, Any] = {fields[k]: v for k, v in settings.items() if v is not None}
    stage.config.build(by_field | {"output": str(output)})
    return Step(name, stage, output, settings, files, needs)


def _with_current_names(given: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """The settings of a step under the current names of options. Raises UsageError for an unknown one."""
    names, options = stage.config.option_names(), stage.config.options()
    present = {field: name for name, field in names.items() if name not in options[field][1].aliases}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name == "command":
            continue
        if name not in names or name in SET_BY_RUN:
            known = sorted(set(present.values()) - SET_BY_RUN)
            raise UsageError(
                f"`cai {stage.name}` has no option {name!r}",
                hint=f"it has {', '.join(known)}",
                code="unknown-option",
            )
        current = present[names[name]]
        if current in settings:
            raise UsageError(
                f"{current!r} is given twice: {name!r} is the same option under another name",
                hint="remove one of them",
                code="option-conflict",
            )
        settings[current] = _word(value, stage.config.model_fields[names[name]].annotation)
    return settings


def _word(value: Any, choice: Any) -> Any:
    """`value`, or "on" or "off" where YAML read these words as true and false and they are values of the option."""
    if isinstance(value, bool) and isinstance(choice, type) and issubclass(choice, StrEnum) and "off" in set(choice):
        return "on" if value else "off"
    return value


def _constitution_files(values: Sequence[Any], stage: Stage, folder: Path) -> list[Any]:
    """The constitutions of a step: for a directory, the file of the kind that the stage reads, or all files."""
    several = "constitution" in takes_many(stage.name)
    kinds = list(SHIPPED) if several else [constitution_kind(stage)]
    found: list[Any] = []
    for value in values:
        directory = folder / str(value)
        names = [SHIPPED[kind] for kind in kinds if not several or (directory / SHIPPED[kind]).exists()]
        is_directory = isinstance(value, str) and directory.is_dir()
        found += [f"{value}/{name}" for name in names] if is_directory else [value]
    return found


def constitution_kind(stage: Stage) -> str:
    """The kind of constitution that a stage reads, which decides the file that it reads in a directory with both."""
    return "preference" if issubclass(stage.config, JudgeOptions) else "critique-revision"


def _check_urls(urls: Any, option: str) -> None:
    """Raises UsageError where an address contains a key or password, which run.json must not record."""
    from cai_cli.engines.server_address import checked_url

    for url in [urls] if isinstance(urls, str) else urls or ():
        checked_url(url, option)


def _model_beside(value: str, folder: Path) -> str:
    """The name of a model, with each directory of DIR or BASE+ADAPTER that lies beside the run file found from here."""

    def found(part: str) -> str:
        beside = "/" in part and not Path(part).exists() and (folder / part).is_dir()
        return os.path.relpath(folder / part) if beside else part

    base, plus, adapter = value.rpartition("+")
    return f"{found(base)}{plus}{found(adapter)}"


def _reads_file(config: type[StageConfig], name: str, value: Value, folder: Path) -> bool:
    _, declared = config.options()[config.option_names()[name]]
    return declared.reads_file or (declared.text_or_file and os.path.isfile(os.path.join(folder, str(value))))


def _resolve(value: Value, steps: Mapping[str, Step], folder: Path | None) -> tuple[Value, Step | str | None]:
    """A setting as the command receives it, and the step or file that it refers to. Files are relative to `folder`."""
    if isinstance(value, str) and "\0" in value:
        raise UsageError(
            f"{value!r} contains a NUL character, which a command line cannot contain", code="invalid-option"
        )
    if isinstance(value, str) and value.partition("+@")[2].partition("/")[0] in steps:  # BASE+ADAPTER
        raise UsageError(
            f"{value!r}: a step is referred to by the whole value",
            hint="the model of a training step is the complete one: '@STEP'",
            code="invalid-option",
        )
    if reference := split_reference(value):
        name, step = reference
        if step not in steps:
            raise UsageError(f"no earlier step {step!r}", code="unknown-step")
        return f"{name}{steps[step].output}", steps[step]
    if folder is None or not isinstance(value, str) or value == "none" or value.startswith("hf://"):
        return value, None
    name, path = ("", value) if (folder / value).exists() else split_name(value)
    path = os.path.relpath(folder / path)
    return f"{name}{path}", path
