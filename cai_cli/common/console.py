"""Writes messages and progress bars to stderr, safe for terminals. Data never passes through this module."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_quiet = False
SECRETS = ("OPENAI_API_KEY", "PM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment variables
SHORTEST_SECRET = 12  # characters: the placeholders for servers without keys (`none`, `EMPTY`) are not secrets
_muted = False
_errors_muted = False
_rows_on_stdout = False


def set_quiet(quiet: bool) -> None:
    """With `--quiet` only errors are printed."""
    global _quiet
    _quiet = quiet


def set_rows_on_stdout(rows: bool) -> None:
    """Whether stdout carries rows, so that a summary or an error in JSON goes to stderr."""
    global _rows_on_stdout
    _rows_on_stdout = rows


def mute() -> None:
    """Print nothing from now on, not even warnings: rank 0 prints for all processes."""
    global _muted
    _muted = True


def mute_errors(muted: bool) -> None:
    """Whether to leave the printing of errors to another process."""
    global _errors_muted
    _errors_muted = muted


def stderr() -> Console:
    """A console on the current `sys.stderr`; created at each call, so that redirection in tests and pipes works."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def safe(text: str) -> str:
    r"""`text` with control characters and bidirectional overrides escaped as \xNN, so it cannot control a terminal."""
    return "".join(c if _is_printable(c) else c.encode("unicode_escape").decode() for c in text)


def safe_json(line: bytes) -> bytes:
    r"""A line of JSON with the characters that `safe` escapes written as \uXXXX. The JSON value stays the same."""
    return "".join(c if _is_printable(c) else f"\\u{ord(c):04x}" for c in line.decode()).encode()


def redacted(text: str) -> str:
    """`text` with every secret replaced by the name of its environment variable."""
    for name in SECRETS:
        if len(secret := os.environ.get(name, "").strip()) >= SHORTEST_SECRET:
            text = text.replace(secret, f"[{name}]")
    return text


def _printable_text(text: str) -> str:
    return escape(safe(redacted(text)))


def _is_printable(c: str) -> bool:
    if c in "\n\t":
        return True
    code = ord(c)
    return not (code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)


def say(text: str) -> None:
    """Print one message on stderr, unless quiet."""
    if not (_quiet or _muted):
        stderr().print(_printable_text(text))


def warn(text: str) -> None:
    """Print a warning on stderr, even when quiet."""
    if not _muted:
        stderr().print(f"[yellow]warning:[/yellow] {_printable_text(text)}")


def error(message: str, hint: str | None = None) -> None:
    """Print `error: ...` and, on the next line, `hint: ...`."""
    if _errors_muted:
        return
    console = stderr()
    console.print(f"[bold red]error:[/bold red] {_printable_text(message)}")
    if hint:
        console.print(f"[cyan]hint:[/cyan] {_printable_text(hint)}")


def error_json(error: dict[str, Any]) -> None:
    """Print an error as one JSON object, in place of the summary of `--json`."""
    if not _errors_muted:
        text = redacted(json.dumps({"error": error}, ensure_ascii=False))
        print(safe(text), file=sys.stderr if _rows_on_stdout else sys.stdout, flush=True)


def bug(trace: str) -> None:
    """Print the traceback of an unexpected error. It may quote rows and server replies, so secrets are replaced."""
    if not _errors_muted:
        stderr().print(_printable_text(trace.rstrip()))
    error(
        "this is a bug in cai: please report the lines above",
        "finished rows are kept; run the same command again to resume",
    )


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"-- {self.unit}/s")


@contextmanager
def track(total: float | None, description: str, unit: str = "rows") -> Iterator[Callable[[float], None]]:
    """A progress bar with rate and remaining time on stderr; none when quiet or when stderr is not a terminal.

    Args:
        total: The number of units of work; None if unknown.
        description: The text before the bar.
        unit: What is counted, for the rate.

    Yields:
        A function that advances the bar by a number of units.
    """
    if _quiet or _muted or not sys.stderr.isatty():
        yield lambda _n: None
        return
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


class Stopwatch:
    """Measures wall time from its creation."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the creation."""
        return time.monotonic() - self.started
