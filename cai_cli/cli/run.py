"""`cai run FILE`: run a pipeline from one file."""

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
from cai_cli.report.command import report_at_the_end


def command(
    file: Annotated[Path, typer.Argument(help="YAML run file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; by default runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print rows, tokens and commands; run nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a pipeline from one file; run it again to resume.

    A step whose settings, inputs or earlier steps changed is run again, with a message that says why. Ends with the
    report (`cai report`).
    """
    loaded = load_run(file)
    folder = out or Path("runs") / loaded.name
    steps = plan(loaded, file, folder)
    if len(steps) > len(loaded.steps):
        console.say(
            f"run {loaded.name}: the {len(loaded.steps)} steps of {file} with their lists are {len(steps)} steps"
        )
    if dry_run:
        from cai_cli.pipeline.estimate import print_estimate

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
