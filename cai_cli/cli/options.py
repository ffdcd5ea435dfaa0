"""Options of the commands that are not stages, each declared once. Stages declare options in their config model."""

from typing import Annotated

import typer

from cai_cli.common import console
from cai_cli.runtime.shared_options import DEFAULT_MODEL

__all__ = ["DEFAULT_MODEL", "Input", "Json", "Overwrite", "Quiet"]


def _quiet(quiet: bool) -> bool:
    console.set_quiet(quiet)
    return quiet


Input = Annotated[str, typer.Argument(metavar="INPUT", help="JSONL file, or - for stdin.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="Print only errors and warnings.")]
