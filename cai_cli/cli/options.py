"""Options of the commands that are not stages, each declared once. Stages declare options in their config model."""

from pathlib import Path
from typing import Annotated

import typer

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.runtime.shared_options import DEFAULT_MODEL

__all__ = ["DEFAULT_MODEL", "Input", "Json", "Overwrite", "Quiet", "refuse_existing"]


def _quiet(quiet: bool) -> bool:
    console.set_quiet(quiet)
    return quiet


Input = Annotated[str, typer.Argument(metavar="INPUT", help="JSONL file, or - for stdin.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="Print only errors and warnings.")]


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Refuse to replace a file without --overwrite; None is no file.

    Raises:
        CaiError: The file exists (`output-exists`).
    """
    if path and path.exists() and not overwrite:
        raise CaiError(f"{path} exists", hint="--overwrite replaces it", code="output-exists")
