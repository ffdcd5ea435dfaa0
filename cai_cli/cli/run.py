"""`cai run FILE`: runs a pipeline from one file."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.evaluate.outcome import lines
from cai_cli.pipeline.execute import Revise, execute
from cai_cli.pipeline.outcome import check_outcome, record_outcome
from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.rounds import Repeat
from cai_cli.pipeline.run_file import load_run
from cai_cli.pipeline.step_process import StepProcesses
from cai_cli.pipeline.stop_rounds import Rounds, check_stops, early_ends
from cai_cli.pipeline.sweep import write_curves
from cai_cli.report.command import report_finished_run
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option, redefine
from cai_cli.runtime.shared_options import RunOptions

_RAY = Option(Effect.HARMLESS, Group.RAY)


class Executor(StrEnum):
    """Where the steps of a run are run."""

    LOCAL = "local"
    RAY = "ray"


class Size(StrEnum):
    """The sizes of models that can be planned without one."""

    B8 = "8B"
    B32 = "32B"
    B70 = "70B"


class RunConfig(StageConfig):
    """Run a pipeline from one file, or resume it.

    A step runs again when its settings, its input files or an earlier step changed, and a message names the change. At
    the end the report is written (`cai report`).
    """

    file: Path = option(..., "YAML run file.", Option(argument=True, metavar="FILE"))
    out: Path | None = option(None, "Run folder; by default runs/NAME.", Option(flags=("--out", "-o")))
    changes: list[str] | None = option(
        None,
        "Replace a setting of the run file: model=NAME, STEP.OPTION=VALUE, or *.OPTION=VALUE for all steps that have "
        "the option. VALUE is YAML. Can be repeated.",
        Option(flags=("--set",), metavar="NAME=VALUE"),
    )
    dry_run: bool = option(
        False, "Print the rows, tokens, memory and command of each step, and run nothing.", Option(flags=("--dry-run",))
    )
    size: Size | None = option(
        None, "With --dry-run: plan as if every model had this size, with memory and hours on 1 and on 8 H100s."
    )
    executor: Executor = option(
        Executor.LOCAL, "Run steps as child processes, or as tasks on a Ray cluster (extra `ray`)."
    )
    address: str | None = option(
        None, "The cluster; by default that of this node.", Option(Effect.HARMLESS, Group.RAY, metavar="HOST:PORT")
    )
    shards: int | None = option(None, "Shards of a data step; by default as many as run at once.", _RAY, ge=1)
    task_cpus: int | None = option(None, "CPUs of a task, or of a training process; by default 1.", _RAY, ge=1)
    task_gpus: int | None = option(
        None, "GPUs of a task; by default 1 if the cluster has GPUs and the step runs a model.", _RAY, ge=0
    )
    as_json: bool = redefine(RunOptions, "as_json", False, "Print one JSON object.")
    quiet: bool = redefine(RunOptions, "quiet", False)

    def check(self) -> None:
        super().check()
        if self.size and not self.dry_run:
            raise UsageError(
                "--size is for --dry-run", hint="--set model=NAME runs another model", code="option-conflict"
            )
        given = [name for name in ("address", "shards", "task_cpus", "task_gpus") if getattr(self, name) is not None]
        if given and self.executor is not Executor.RAY:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for Ray", hint="add --executor ray", code="option-conflict"
            )


def run(config: RunConfig) -> None:
    """Run the pipeline and print its summary. Raises CaiError."""
    loaded = load_run(config.file, config.changes or ())
    folder = config.out or Path("runs") / loaded.name
    steps = plan(loaded, config.file, folder)
    check_stops(loaded, steps)
    check_outcome(loaded.outcome, steps)
    written = sum(len(given.steps) if isinstance(given, Repeat) else 1 for given in loaded.steps.values())
    if len(steps) > written:
        why = "rounds and lists" if loaded.blocks else "lists"
        console.say(f"run {loaded.name}: the {why} of {config.file} expand its {written} steps to {len(steps)}")
    if config.size:
        from cai_cli.pipeline.size_plan import plan_size, print_size

        if config.as_json:
            print(orjson.dumps([one.as_json() for one in plan_size(steps, config.size)]).decode())
        else:
            print_size(steps, config.size)
        return
    if config.dry_run:
        from cai_cli.pipeline.estimate import print_estimate

        print_estimate(steps, as_json=config.as_json, may_end=early_ends(loaded, steps))
        return
    stopwatch = console.Stopwatch()
    rounds = Rounds(loaded, steps, lambda endings: plan(loaded, config.file, folder, endings))
    done = _execute(config, steps, folder, rounds.after)
    write_curves(step.output for step in steps if step.command == "eval compare")
    outcome = record_outcome(loaded.outcome, rounds.steps, folder)
    report = report_finished_run(folder)
    if config.as_json:
        summary: dict[str, Any] = {
            "run": loaded.name,
            "folder": str(folder),
            "report": report and str(report),
            "steps": done,
        }
        summary |= {"rounds": rounds.reports} if rounds.reports else {}
        summary |= {"outcome": outcome} if outcome else {}
        print(orjson.dumps(summary).decode())
    for step in done:
        if step.get("labels", {}).get("trusted") is False:
            console.warn(f"do not trust the labels of step {step['step']!r}: {step['labels']['reason']}")
    for line in lines(outcome or {}):
        console.say(f"outcome: {line}")
    console.say(f"run {loaded.name}: {len(done)} steps in {stopwatch.seconds:,.0f} s -> {folder}")


def _execute(config: RunConfig, steps: list[Step], folder: Path, revise: Revise) -> list[dict[str, Any]]:
    if config.executor is Executor.LOCAL:
        with StepProcesses(quiet=config.quiet) as processes:
            return execute(steps, folder, processes.run, revise)
    from cai_cli.pipeline.ray_executor import RayExecutor, RayOptions

    ray_options = RayOptions(config.address, config.shards, config.task_cpus or 1, config.task_gpus)
    with RayExecutor(ray_options, folder) as cluster:
        return execute(steps, folder, cluster.run, revise)
