"""`cai report RUN`: the command, and what `cai run` calls at its end."""

from pathlib import Path

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.files import write_atomically


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Draw the report of a run folder into `output` (by default FOLDER/report.html). Raises CaiError."""
    path = output or folder / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"{path} is no .html file", hint="-o page.html")
    from cai_cli.report.collect import read_run
    from cai_cli.report.page import render

    run = read_run(folder)
    page = render(run)
    for problem in run.problems:
        console.warn(problem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CaiError(
            f"cannot write {path}: {error.strerror}", hint="choose another -o", code="cannot-write"
        ) from error
    write_atomically(path, [page.encode()])
    return path


def report_at_the_end(folder: Path) -> Path | None:
    """The report of a run that has just ended; whatever goes wrong with the drawing, the run itself is done."""
    try:
        path = write_report(folder)
    except Exception as error:  # a page must not turn a finished run into a failed one
        reason = error.message if isinstance(error, CaiError) else f"{type(error).__name__}: {error}"
        console.error(f"the run is done, but its report could not be drawn: {reason}", f"cai report {folder}")
        return None
    console.say(f"report: {path}")
    return path
