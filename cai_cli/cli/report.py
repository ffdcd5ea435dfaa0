"""`cai report`: writes the report of a run folder."""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.report.command import write_report


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; by default RUN/report.html.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the report of a run as one HTML page.

    The page needs no network. The report of an unfinished run names the steps that are missing.
    """
    path = write_report(run, output)
    if json:
        print(orjson.dumps({"run": str(run), "output": str(path), "bytes": path.stat().st_size}).decode())
    console.say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
