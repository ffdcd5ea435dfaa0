"""The one place that writes to stderr: messages, progress, terminal-safe text. Data never goes through here."""

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
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment variables
SHORTEST_SECRET = 12  # characters: what servers without keys are given (`none`, `EMPTY`) is a word, and no secret
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
    """Say nothing from now on, not even warnings: another process speaks for this one."""
    global _muted
    _muted = True


def mute_errors(muted: bool) -> None:
    """Whether another process says what went wrong in this one."""
    global _errors_muted
    _errors_muted = muted


def stderr() -> Console:
    """A console on the current `sys.stderr` (made anew, so that redirection in tests and pipes is honoured)."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def safe(text: str) -> str:
    """`text` without what could steer a terminal: control characters and bidirectional overrides become \\xNN."""
    return "".join(c if _printable(c) else c.encode("unicode_escape").decode() for c in text)


def safe_json(line: bytes) -> bytes:
    """A line of JSON with each of those characters as \\uXXXX: it means the same."""
    return "".join(c if _printable(c) else f"\\u{ord(c):04x}" for c in line.decode()).encode()


def redacted(text: str) -> str:
    """`text` with the name of its environment variable in place of every key."""
    for name in SECRETS:
        if len(secret := os.environ.get(name, "").strip()) >= SHORTEST_SECRET:
            text = text.replace(secret, f"[{name}]")
    return text


def _shown(text: str) -> str:
    return escape(safe(redacted(text)))


def _printable(c: str) -> bool:
    if c in "\n\t":
        return True
    code = ord(c)
    return not (code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)


def say(text: str) -> None:
    """One message for a person, on stderr, unless quiet."""
    if not (_quiet or _muted):
        stderr().print(_shown(text))


def warn(text: str) -> None:
    """Something the user should know though the run goes on; printed even when quiet."""
    if not _muted:
        stderr().print(f"[yellow]warning:[/yellow] {_shown(text)}")


def error(message: str, hint: str | None = None) -> None:
    """`error: ...` and, under it, `hint: ...`."""
    if _errors_muted:
        return
    console = stderr()
    console.print(f"[bold red]error:[/bold red] {_shown(message)}")
    if hint:
        console.print(f"[cyan]hint:[/cyan] {_shown(hint)}")


def error_json(error: dict[str, Any]) -> None:
    """The error as one JSON object, where the summary of `--json` would have been printed."""
    if not _errors_muted:
        text = redacted(json.dumps({"error": error}, ensure_ascii=False))
        print(safe(text), file=sys.stderr if _rows_on_stdout else sys.stdout, flush=True)


def bug(trace: str) -> None:
    """An error that nobody foresaw: its traceback, which may quote rows and answers of servers."""
    if not _errors_muted:
        stderr().print(_shown(trace.rstrip()))
    error("this is a bug of cai: please report the lines above", "what is written is kept; run the same again to go on")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"-- {self.unit}/s")


@contextmanager
def track(total: float | None, description: str, unit: str = "rows") -> Iterator[Callable[[float], None]]:
    """A progress bar with rate and time left on stderr; nothing when stderr is no terminal or when quiet.

    Yields `advance(n)`.
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
    """Wall seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
