"""`cai run FILE.yaml`: runs a pipeline from one file. Each step is one `cai` command.

    name: quickstart
    model: smollm2-135m          # default of the steps that take --model
    seed: 0
    steps:
      samples:   {command: sample, input: red_team.jsonl, n: 2}
      revisions: {command: critique-revise, input: "@samples", rounds: 2}

`@step` is the output of an earlier step. Paths are relative to the YAML file; outputs go to `--out` (runs/NAME). A list
for a setting is a sweep: see `sweep.py`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.models.template_date import template_date
from cai_cli.pipeline.plan import KEY_FORMAT, Step
from cai_cli.runtime.config import plain
from cai_cli.runtime.manifest import differences, read_manifest, write_json
from cai_cli.runtime.output_files import one_writer, reuse_recorded_date, sidecar

RunStep = Callable[[Step, bool], None]  # runs a step, with or without --overwrite; raises CaiError if it fails
# Given a step that is done and the record of the run, which it may add to: the steps of the run from now on, which
# begin with those that are done, or None where they stay the same.
Revise = Callable[[Step, dict[str, Any]], Sequence[Step] | None]


def execute(
    steps: Sequence[Step], out: Path, run_step: RunStep, revise: Revise = lambda step, record: None
) -> list[dict[str, Any]]:
    """Run the steps that are not done, in order, and record each in `OUT/run.json`.

    Args:
        steps: The steps of the run.
        out: The run folder.
        run_step: Runs a step (`StepProcesses.run`, or an executor's).
        revise: Called after each step, also after one that was done before.

    Returns:
        One record per step: its name, output, command line, settings, status and seconds.

    Raises:
        CaiError: A step failed, or another `cai run` is writing to the folder.
    """
    record_path = out / "run.json"
    with one_writer(record_path, f"the run in {out}"):
        record = _read_record(record_path)
        for decided_again in ("rounds", "outcome"):
            record.pop(decided_again, None)
        for step in reversed(steps):  # the first step that recorded a date decides it for the steps to come
            reuse_recorded_date(str(step.output))
        template_date()  # held now, for all steps
        record["planned"] = {step.name: step.argv for step in steps}  # for the report of a run that is not finished
        current: set[str] = set()  # steps recorded with the settings, files and earlier steps of this run
        place = 0
        while place < len(steps):
            step = steps[place]
            previous = record["steps"].get(step.name)
            if previous and _is_current(step, previous, current):
                current.add(step.name)
                previous["key"] = step.key
            if previous and step.name in current and previous["status"] == "done" and step.output.exists():
                console.say(f"[{step.name}] already done: {step.output}")
            else:
                _run_and_record(step, previous, steps, record, record_path, run_step)
                if previous is None or previous["key"] == step.key:
                    current.add(step.name)
            known = record.get("rounds")
            steps, place = revise(step, record) or steps, place + 1
            if record.get("rounds") is not known:
                write_json(record_path, record)
        return [{"step": s.name, "output": str(s.output), **record["steps"][s.name]} for s in steps]


def _read_record(path: Path) -> dict[str, Any]:
    """What earlier runs recorded. Raises CaiError (`invalid-manifest`) for what `cai run` does not write."""
    hint = "remove the file to run all steps again"
    record = read_manifest(path, hint) or {"steps": {}}
    steps = record.get("steps")
    for name, entry in steps.items() if isinstance(steps, dict) else [("steps", None)]:
        given = entry if isinstance(entry, dict) else {}
        texts = all(isinstance(given.get(field), str) for field in ("key", "status"))
        if not (texts and all(isinstance(given.get(field), dict) for field in ("settings", "files"))):
            raise CaiError(f"{path}: {name[:40]!r} is not what `cai run` writes", hint, code="invalid-manifest")
    return record


def _is_current(step: Step, previous: Mapping[str, Any], current: Collection[str]) -> bool:
    """Whether a step was recorded with the same settings, files and earlier steps.

    In records of version 0.1.0 the key depends on how options were spelled, so their settings are compared instead.
    """
    if previous["key"].startswith(KEY_FORMAT):
        return bool(previous["key"] == step.key)
    return all(need.name in current for need in step.needs) and not _changes(step, previous)


def _changes(step: Step, previous: Mapping[str, Any]) -> list[str]:
    """The settings and files of a step that differ from its record."""
    names = step.stage.config.option_names()
    options = step.stage.config.options()

    def by_field(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    defaults = {name: plain(field.default) for name, (field, _) in options.items() if not field.is_required()}
    recorded = {"settings": defaults | by_field(previous["settings"]), "files": by_field(previous["files"])}
    return differences(recorded, {"settings": defaults | by_field(step.settings), "files": by_field(step.files)})


def _run_and_record(
    step: Step,
    previous: Mapping[str, Any] | None,
    steps: Sequence[Step],
    record: dict[str, Any],
    record_path: Path,
    run_step: RunStep,
) -> None:
    changed = previous is not None and previous["key"] != step.key
    if previous and changed:
        _report_change(step, previous, steps)
    # The output to replace. It is recorded, because a run may be interrupted before the step starts.
    replaces = _manifests(step.output) if changed else previous.get("replaces") if previous else None
    entry = {
        "key": step.key,
        "argv": step.argv,
        "settings": dict(step.settings),
        "files": dict(step.files),
        "replaces": replaces,
    }
    record["steps"][step.name] = {**entry, "status": "running", "seconds": None}
    write_json(record_path, record)
    overwrite, stopwatch = replaces is not None and replaces == _manifests(step.output), console.Stopwatch()
    run_step(step, overwrite)
    seconds = round(stopwatch.seconds, 1)
    record["steps"][step.name] = {**entry, "status": "done", "seconds": seconds, **_label_trust(step)}
    write_json(record_path, record)


def _label_trust(step: Step) -> dict[str, Any]:
    """For a step that labels: whether its labels can be trusted (true, false, or null for unknown) and why."""
    if step.command not in ("label-prefs", "pairs"):
        return {}
    from cai_cli.metrics.label_audit import audit_file

    audit = audit_file(str(step.output))
    return {"labels": {"trusted": audit["trusted"], "reason": audit["reason"]}}


def _manifests(output: Path) -> list[int | None]:
    """The times (ns) when the manifests of an output were written, which distinguish two versions of it."""
    paths = (sidecar(output, ending) for ending in ("manifest.json", "partial.manifest.json"))
    return [path.stat().st_mtime_ns if path.exists() else None for path in paths]


def _report_change(step: Step, previous: Mapping[str, Any], steps: Sequence[Step]) -> None:
    """Print why a step runs again, and which later steps it affects."""
    why = "; ".join(_changes(step, previous)) or "an earlier step changed"
    after = [s.name for s in steps if step in _ancestors(s)]
    more = f", and after it {', '.join(after)}" if after else ""
    console.say(f"[{step.name}] changed since its last run ({why}): running it again{more}")


def _ancestors(step: Step) -> list[Step]:
    return [a for need in step.needs for a in (need, *_ancestors(need))]
