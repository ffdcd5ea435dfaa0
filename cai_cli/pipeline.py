"""`cai run FILE.yaml`: the road from one file. Each step is the very command that would run it alone.

    name: quickstart
    model: smollm2-135m          # for every step that takes --model and does not name one
    seed: 0
    steps:
      samples:   {command: sample, input: red_team.jsonl, n: 2}
      revisions: {command: critique-revise, input: "@samples", rounds: 2}

`@step` is the output of an earlier step. Files are found beside the YAML file; outputs go to `--out` (runs/NAME).
A list for a setting is a sweep: see `sweep.py`.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cai_cli import console, options
from cai_cli.constitution import load_yaml
from cai_cli.errors import CaiError, UsageError
from cai_cli.manifest import differences, hash_input, read_manifest, write_json
from cai_cli.outputs import one_writer, sidecar
from cai_cli.report.command import report_at_the_end
from cai_cli.sweep import LONGEST_NAME, Value, expand, split_name, split_reference, write_curves

DATA_STAGES = frozenset({"red-team", "sample", "critique", "revise", "critique-revise", "label-prefs", "score"})
EVALUATIONS = frozenset({"eval compare", "eval harm"})
TRAINING_STAGES = frozenset({"sft", "train-pm", "rl"})
PATH_OPTIONS = frozenset({"input", "helpful", "mix", "constitution", "few-shot", "avoid", "votes"})
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a run or a step: it becomes a file name


class RunFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    model: str = options.DEFAULT_MODEL
    seed: int = 0
    steps: dict[Annotated[str, Field(pattern=NAME)], dict[str, Value | list[Value]]] = Field(min_length=1)


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


def load_run(path: Path) -> RunFile:
    """Read and check a run file. Raises CaiError naming the file and the first thing that is wrong."""
    try:
        return RunFile.model_validate(load_yaml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CaiError(f"{path}: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None


def plan(run: RunFile, file: Path, out: Path) -> list[Step]:
    """The steps in order, sweeps expanded, checked against the options each command has. Raises UsageError."""
    from cai_cli.engines.served import checked_url

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
    from cai_cli.cli import app

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


def execute(steps: Sequence[Step], out: Path, *, quiet: bool) -> list[dict[str, Any]]:
    """Run what is not done, in order; the state after every step stands in `OUT/run.json`. Raises CaiError."""
    record_path = out / "run.json"
    with one_writer(record_path):
        record = read_manifest(record_path) or {"steps": {}}
        for step in steps:
            before = record["steps"].get(step.name)
            if before and before["key"] == step.key and before["status"] == "done" and step.output.exists():
                console.say(f"[{step.name}] done already: {step.output}")
                continue
            again = bool(before) and before["key"] != step.key
            if again:
                _say_why(step, before, steps)
            # What is to be replaced: a run interrupted before the step came to it has still to replace it.
            replaces = _manifests(step.output) if again else before.get("replaces") if before else None
            entry = {
                "key": step.key,
                "argv": step.argv,
                "settings": dict(step.settings),
                "files": dict(step.files),
                "replaces": replaces,
            }
            record["steps"][step.name] = {**entry, "status": "running", "seconds": None}
            write_json(record_path, record)
            seconds = _run(step, overwrite=replaces is not None and replaces == _manifests(step.output), quiet=quiet)
            record["steps"][step.name] = {**entry, "status": "done", "seconds": round(seconds, 1), **_judged(step)}
            write_json(record_path, record)
        return [{"step": s.name, "output": str(s.output), **record["steps"][s.name]} for s in steps]


def _judged(step: Step) -> dict[str, Any]:
    """Of a step that labels: whether its labels can be trusted (true, false, null: not known) and why."""
    if step.command != "label-prefs":
        return {}
    from cai_cli.evaluate.agreement import audit_file

    found = audit_file(str(step.output))
    return {"labels": {"trusted": found["trusted"], "reason": found["reason"]}}


def _manifests(output: Path) -> list[int | None]:
    """Tells one making of `output` from another: when its manifests were written (ns), finished or not."""
    paths = (sidecar(output, ending) for ending in ("manifest.json", "partial.manifest.json"))
    return [path.stat().st_mtime_ns if path.exists() else None for path in paths]


def _say_why(step: Step, before: Mapping[str, Any], steps: Sequence[Step]) -> None:
    changed = differences(
        {"settings": before["settings"], "files": before["files"]},
        {"settings": dict(step.settings), "files": dict(step.files)},
    )
    why = "; ".join(changed) or "a step before it changed"
    after = [s.name for s in steps if step in _ancestors(s)]
    more = f", and after it {', '.join(after)}" if after else ""
    console.say(f"[{step.name}] changed since its last run ({why}): running it again{more}")


def _ancestors(step: Step) -> list[Step]:
    return [a for need in step.needs for a in (need, *_ancestors(need))]


def _run(step: Step, *, overwrite: bool, quiet: bool) -> float:
    """The step as a process of its own, ended when this one is. Returns seconds; raises CaiError when it fails."""
    words = [*step.argv, *(["--overwrite"] if overwrite else []), *(["--quiet"] if quiet else [])]
    console.say(f"[{step.name}] $ {shlex.join(['cai', *words])}")
    watch = console.Stopwatch()
    child = subprocess.Popen([sys.executable, "-m", "cai_cli", *words], preexec_fn=_die_with_parent)  # noqa: S603, PLW1509
    try:
        code = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code != 0:
        raise CaiError(
            f"step {step.name!r} ended with exit code {code}: {step.shell}",
            hint="mend what it says above, then run the same `cai run` again: it goes on from here",
        )
    return watch.seconds


def _die_with_parent() -> None:
    """A killed `cai run` must not leave a step writing on (Linux; elsewhere the lock still guards the output)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run_command(
    file: Annotated[Path, typer.Argument(help="YAML run file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; by default runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print rows, tokens and commands; run nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the whole road from one file; run it again to go on where it stopped.

    A step whose settings, inputs or earlier steps changed is run anew, and said so. Ends with the report
    (`cai report`).
    """
    loaded = load_run(file)
    folder = out or Path("runs") / loaded.name
    steps = plan(loaded, file, folder)
    if len(steps) > len(loaded.steps):
        console.say(
            f"run {loaded.name}: the {len(loaded.steps)} steps of {file} with their lists are {len(steps)} steps"
        )
    if dry_run:
        from cai_cli.estimate import print_estimate

        print_estimate(steps, as_json=json)
        return
    watch = console.Stopwatch()
    done = execute(steps, folder, quiet=quiet)
    write_curves(step.output for step in steps if step.command == "eval compare")
    report = report_at_the_end(folder)
    if json:
        summary = {"run": loaded.name, "folder": str(folder), "report": report and str(report), "steps": done}
        print(orjson.dumps(summary).decode())
    for step in done:
        if step.get("labels", {}).get("trusted") is False:
            console.warn(f"the labels of step {step['step']!r} are not to be trusted: {step['labels']['reason']}")
    console.say(f"run {loaded.name}: {len(done)} steps in {watch.seconds:,.0f} s -> {folder}")
