"""`cai run FILE`: runs a pipeline from one file."""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.pipeline.execute import execute
from cai_cli.pipeline.plan import plan
from cai_cli.pipeline.run_file import load_run
from cai_cli.pipeline.sweep import write_curves
from cai_cli.report.command import report_finished_run


def command(
    file: Annotated[Path, typer.Argument(help="YAML run file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; by default runs/NAME.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the rows, tokens, memory and command of each step, and run nothing."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a pipeline from one file, or resume it.

    A step runs again when its settings, its input files or an earlier step changed, and a message names the change. At
    the end the report is written (`cai report`).
    """
    loaded = load_run(file)
    folder = out or Path("runs") / loaded.name
    steps = plan(loaded, file, folder)
    if len(steps) > len(loaded.steps):
        console.say(f"run {loaded.name}: the lists of {file} expand its {len(loaded.steps)} steps to {len(steps)}")
    if dry_run:
        from cai_cli.pipeline.estimate import print_estimate

        print_estimate(steps, as_json=json)
        return
    stopwatch = console.Stopwatch()
    done = execute(steps, folder, quiet=quiet)
    write_curves(step.output for step in steps if step.command == "eval compare")
    report = report_finished_run(folder)
    if json:
        summary = {"run": loaded.name, "folder": str(folder), "report": report and str(report), "steps": done}
        print(orjson.dumps(summary).decode())
    for step in done:
        if step.get("labels", {}).get("trusted") is False:
            console.warn(f"do not trust the labels of step {step['step']!r}: {step['labels']['reason']}")
    console.say(f"run {loaded.name}: {len(done)} steps in {stopwatch.seconds:,.0f} s -> {folder}")
