"""Writes the report of a run folder (`cai report`, and the end of `cai run`)."""

from pathlib import Path

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.files import write_atomically, write_error


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run folder and return its path.

    Args:
        folder: The run folder.
        output: The HTML file; by default FOLDER/report.html.

    Raises:
        UsageError: `output` is not an .html file.
        CaiError: `folder` is not a run folder, or the file cannot be written.
    """
    path = output or folder / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"{path} is not an .html file", hint="-o page.html", code="invalid-option")
    from cai_cli.report.collect import read_run
    from cai_cli.report.page import render

    run = read_run(folder)
    page = render(run)
    for problem in run.problems:
        console.warn(problem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error, hint="choose another -o") from error
    write_atomically(path, [page.encode()])
    return path


def report_finished_run(folder: Path) -> Path | None:
    """Write the report of a run that just finished; return None, and print the error, if that fails."""
    try:
        path = write_report(folder)
    except Exception as error:  # a failed report must not fail a finished run
        reason = error.message if isinstance(error, CaiError) else f"{type(error).__name__}: {error}"
        console.error(f"the run finished, but its report could not be written: {reason}", f"cai report {folder}")
        return None
    console.say(f"report: {path}")
    return path
