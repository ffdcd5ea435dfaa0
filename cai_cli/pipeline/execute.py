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
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.pipeline.plan import Step
from cai_cli.runtime.manifest import differences, read_manifest, write_json
from cai_cli.runtime.output_files import one_writer, sidecar


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
    from cai_cli.metrics.label_audit import audit_file

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
    monitor_score_of = console.Stopwatch()
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
    return monitor_score_of.seconds


def _die_with_parent() -> None:
    """A killed `cai run` must not leave a step writing on (Linux; elsewhere the lock still guards the output)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
