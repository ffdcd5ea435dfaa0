"""Reads rows from JSONL, JSON, CSV, TSV, parquet, plain text and the Hub, and appends rows so that a killed run keeps
everything it wrote.

Every error names file and line (`lines`). Rows are appended to `OUT.partial` in whole batches, one write each.
`runtime.sinks` renames the complete file to `OUT`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from cai_cli.common.errors import InvalidRow, RowError
from cai_cli.common.files import write_error
from cai_cli.data.dropped import Dropped
from cai_cli.data.formats import parse_prompt, parse_prompt_with_rubric
from cai_cli.data.lines import (
    COMPRESSED,
    MAX_LINE_BYTES,
    Numbered,
    OnInvalid,
    display_name,
    open_input,
    origin,
    raise_invalid,
    skip_unusable,
)
from cai_cli.data.row_types import row_key, row_type_of
from cai_cli.data.schema import Kind, Prompt, Rejected, Row, dump_row, load_row
from cai_cli.data.sources import Columns, open_rows

__all__ = [
    "COMPRESSED",
    "MAX_LINE_BYTES",
    "Numbered",
    "OnInvalid",
    "display_name",
    "open_input",
    "origin",
    "raise_invalid",
    "skip_unusable",
]
T = TypeVar("T")
R = TypeVar("R", bound=Row)


# --- reading ----------------------------------------------------------------------------------------------------


def read_values(source: str) -> Iterator[Numbered[Any]]:
    """(line number from 1, parsed JSON) of every row.

    Raises:
        InvalidRow: A line is not JSON.
        CaiError: The file cannot be read.
    """
    yield from read_rows(source, lambda value: value)


def read_rows(
    source: str,
    parse: Callable[[Any], T],
    on_invalid: OnInvalid = raise_invalid,
    *,
    columns: Columns | None = None,
    text: bool = False,
) -> Iterator[Numbered[T]]:
    """(line number from 1, row) of every row of an input.

    Args:
        source: A file of a format of `sources.open_rows`, an `hf://` address, or `-` for stdin.
        parse: Turns a JSON value into a row. Raises RowError for an invalid one.
        on_invalid: Called with the error and the bytes of each invalid line; the default stops at the first.
        columns: Which columns hold what, where the user says so.
        text: Whether plain text is an input too; `parse` receives its lines as strings.

    Raises:
        InvalidRow: From `on_invalid`.
        CaiError: The file cannot be read.
    """
    name = display_name(source)
    pick = columns.pick if columns else None
    with open_rows(source, on_invalid, text=text, columns=columns) as rows:
        for number, value in rows.values:
            try:
                decoded = rows.decode(value)
                row = parse(pick(decoded) if pick else decoded)
            except RowError as error:
                on_invalid(InvalidRow(name, number, error.message, error.hint, code=error.code), rows.raw(value))
                continue
            yield number, row


def rows_of(row_type: type[R]) -> Callable[[object], R]:
    """A parser for `read_rows` that validates rows of one type."""
    return lambda value: load_row(row_type, value)


def read_prompts(
    source: str,
    kind: Kind | None = None,
    on_invalid: OnInvalid = raise_invalid,
    *,
    columns: Columns | None = None,
    dropped: Dropped | None = None,
    rubrics: bool = False,
) -> Iterator[Numbered[Prompt]]:
    """(line number from 1, prompt) of every prompt in a file.

    The first line decides between JSON and plain text, so a broken JSON line further down is an error, not a prompt.

    Args:
        source: As in `read_rows`; rows in any format of `formats.parse_prompt`, or plain text, one prompt a line.
        kind: The kind of prompts that have none.
        on_invalid: As in `read_rows`.
        columns: As in `read_rows`.
        dropped: Counts the columns that are left out.
        rubrics: Whether rows with a `rubric` become RubricPrompts; else it is a column that is left out.

    Raises:
        InvalidRow: From `on_invalid`.
        CaiError: The file cannot be read.
    """

    def parse(value: object) -> Prompt:
        parser = parse_prompt_with_rubric if rubrics else parse_prompt
        return parser(value, source=name, kind=kind, dropped=dropped)

    name = origin(source)
    yield from read_rows(source, parse, on_invalid, columns=columns, text=True)


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawLine:
    """A row that `cai` wrote, of any type, as it was read from a file: its key and its JSON."""

    key: str
    data: bytes


class AppendFile:
    """A JSONL file that rows are appended to, each batch in one write that is synced to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None

    def finished_keys(self) -> Iterator[str]:
        """The keys of the rows already in the file. An incomplete last line is cut off first."""
        if not self.path.exists():
            return
        cut_torn_tail(self.path)
        for _, value in read_values(str(self.path)):
            yield row_key(value)

    def rows(self) -> Iterator[RawLine | Rejected]:
        """The rows already in the file. An incomplete last line is cut off first."""
        if not self.path.exists():
            return
        cut_torn_tail(self.path)
        for _, value in read_values(str(self.path)):
            rejected = row_type_of(value) is Rejected
            yield load_row(Rejected, value) if rejected else RawLine(row_key(value), orjson.dumps(value))

    def append(self, rows: Iterable[Row | RawLine]) -> None:
        """Write `rows` and sync them to disk.

        Raises:
            CaiError: The file cannot be written (`cannot-write`).
        """
        self.append_lines((row.data if isinstance(row, RawLine) else dump_row(row)) + b"\n" for row in rows)

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """As `append`, for lines that end with their newlines."""
        data = b"".join(lines)
        if not data:
            return
        try:
            if self.fd is None:
                self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            view = memoryview(data)
            while view:
                view = view[os.write(self.fd, view) :]
            os.fsync(self.fd)
        except OSError as error:
            hint = "finished rows are kept; run the same command again to resume"
            raise write_error(self.path, error, hint) from error

    def close(self) -> None:
        """Close the file, if it was written to."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def cut_torn_tail(path: Path) -> int:
    """Truncate `path` after its last complete line. Returns the number of bytes cut off."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def sync_directory(path: Path) -> None:
    """Sync a directory, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
