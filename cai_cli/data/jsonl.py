"""Reads JSONL with file and line in every error, and appends rows so that a killed run keeps everything it wrote.

Lines end at b"\\n" only (U+2028 is content), and their length is limited before they are parsed. jsonlines decodes
them with orjson as its parser, which refuses NaN, lone surrogates and deep nesting. Repeated keys in one object are an
error.

Rows are appended to `OUT.partial` in whole batches, one write each. `runtime.sinks` renames the complete file to `OUT`.
"""

import codecs
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jsonlines
import orjson

from cai_cli.common.errors import CaiError, InvalidRow, RowError
from cai_cli.data.formats import parse_prompt, row_key, row_type_of
from cai_cli.data.schema import Kind, Prompt, Rejected, Row, dump_row, load_row

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R", bound=Row)
MAX_LINE_BYTES = 64 * 2**20
KEPT_OF_LONG_LINE = 4096
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04", "parquet": b"PAR1"}
_KEY_END = re.compile(rb'"[ \t\r]*:')
Numbered = tuple[int, T]
OnInvalid = Callable[[InvalidRow, bytes], None]


# --- reading ----------------------------------------------------------------------------------------------------


@contextmanager
def open_input(source: str) -> Iterator[BinaryIO]:
    """`source` as a byte stream. `-` is stdin; files named .gz and .zst are decompressed.

    Raises:
        CaiError: The file cannot be read (`cannot-read`).
    """
    if source == "-":
        yield sys.stdin.buffer
        return
    path = Path(source)
    if path.is_dir():
        raise CaiError(f"{source} is a directory, not a JSONL file", hint="name the file inside it", code="cannot-read")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CaiError(f"cannot read {source}: {error.strerror}", code="cannot-read") from error
    with stream:
        yield _decompressed(stream, source) if path.suffix in COMPRESSED else stream


def _decompressed(stream: io.BufferedReader, name: str) -> BinaryIO:
    import pyarrow

    kind = COMPRESSED[Path(name).suffix]
    if not stream.peek(4).startswith(MAGIC[kind]):
        raise CaiError(
            f"{name} is not {kind} data, although its name says so",
            hint="rename the file after its real format",
            code="cannot-read",
        )
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, kind))


def display_name(source: str) -> str:
    """The name of `source` in messages."""
    return "stdin" if source == "-" else source


def origin(source: str) -> str:
    """The `source` of rows that have none: the name of their file, without its folders."""
    return Path(display_name(source)).name


def raise_invalid(error: InvalidRow, _raw: bytes) -> None:
    """The default for invalid lines: reading stops at the first one.

    Raises:
        InvalidRow: Always.
    """
    raise error from None


def _lines(stream: BinaryIO, name: str, on_invalid: OnInvalid) -> Iterator[Numbered[bytes]]:
    number = 0
    while line := _read(stream, name, MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            _refuse_compressed(line, name)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_LINE_BYTES:
            reason = f"a line longer than {MAX_LINE_BYTES >> 20} MiB (its first {KEPT_OF_LONG_LINE:,} bytes are kept)"
            kept = line[: codecs.utf_8_decode(line[:KEPT_OF_LONG_LINE], "replace", False)[1]]
            on_invalid(InvalidRow(name, number, reason, "is this a JSONL file?", code="invalid-row"), kept)
            while line and not line.endswith(b"\n"):
                line = _read(stream, name, 1 << 20)
            continue
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield number, line


def _read(stream: BinaryIO, name: str, size: int) -> bytes:
    try:
        return stream.readline(size)
    except OSError as error:
        raise CaiError(
            f"cannot read {name}: {error.strerror or error}", hint="is the file complete?", code="cannot-read"
        ) from error


def _refuse_compressed(start: bytes, name: str) -> None:
    for kind, magic in MAGIC.items():
        if start.startswith(magic):
            raise CaiError(
                f"{name} is {kind} data, not JSON lines",
                hint="decompress it, or give it the ending .gz, .zst or .parquet",
                code="cannot-read",
            )


def _decode(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        RowError: The line is not JSON.
    """
    try:
        value = jsonlines.Reader([line], loads=orjson.loads).read(allow_none=True)
    except jsonlines.InvalidLineError as error:
        cause = error.__cause__
        # The parser's own "line 1" would be misleading: the message already names the line of the file.
        where = f"{cause.msg} at character {cause.pos + 1}" if isinstance(cause, orjson.JSONDecodeError) else cause
        raise RowError(
            f"not JSON: {where or error}", "each line is one JSON object in UTF-8", code="invalid-row"
        ) from None
    if len(_KEY_END.findall(line)) > _keys_in(value):
        _refuse_repeated_keys(line)
    return value


def _keys_in(value: object) -> int:
    """The number of keys of all objects in a JSON value."""
    keys, unvisited = 0, [value]
    while unvisited:
        inner = unvisited.pop()
        if isinstance(inner, dict):
            keys += len(inner)
            unvisited += inner.values()
        elif isinstance(inner, list):
            unvisited += inner
    return keys


def _refuse_repeated_keys(line: bytes) -> None:
    """Raise RowError if an object in `line` has a key twice: orjson silently takes the last one.

    Every key ends with a quote and a colon, so a line with no more of those than keys repeats none. Only the other
    lines come here and are parsed a second time by the slower parser.
    """

    def distinct(pairs: list[tuple[str, object]]) -> None:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise RowError(f"field {key!r} occurs twice in one object", code="invalid-row")

    try:
        json.loads(line, object_pairs_hook=distinct, parse_int=str, parse_float=str)
    except RecursionError:
        raise RowError("nested too deeply", code="invalid-row") from None


def read_values(source: str) -> Iterator[Numbered[Any]]:
    """(line number from 1, parsed JSON) of every non-blank line.

    Raises:
        InvalidRow: A line is not JSON.
        CaiError: The file cannot be read.
    """
    yield from read_rows(source, lambda value: value)


def read_rows(
    source: str, parse: Callable[[object], T], on_invalid: OnInvalid = raise_invalid
) -> Iterator[Numbered[T]]:
    """(line number from 1, row) of every non-blank line.

    Args:
        source: A JSONL file, or `-` for stdin.
        parse: Turns a JSON value into a row. Raises RowError for an invalid one.
        on_invalid: Called with the error and the bytes of each invalid line; the default stops at the first.

    Raises:
        InvalidRow: From `on_invalid`.
        CaiError: The file cannot be read.
    """
    name = display_name(source)
    with open_input(source) as stream:
        yield from _parsed(_lines(stream, name, on_invalid), name, lambda line: parse(_decode(line)), on_invalid, bytes)


def _parsed(
    lines: Iterable[Numbered[S]],
    name: str,
    parse: Callable[[S], T],
    on_invalid: OnInvalid,
    raw: Callable[[S], bytes],
) -> Iterator[Numbered[T]]:
    for number, value in lines:
        try:
            row = parse(value)
        except RowError as error:
            on_invalid(InvalidRow(name, number, error.message, error.hint, code=error.code), raw(value))
            continue
        yield number, row


def rows_of(row_type: type[R]) -> Callable[[object], R]:
    """A parser for `read_rows` that validates rows of one type."""
    return lambda value: load_row(row_type, value)


def read_prompts(
    source: str, kind: Kind | None = None, on_invalid: OnInvalid = raise_invalid
) -> Iterator[Numbered[Prompt]]:
    """(line number from 1, prompt) of every prompt in a file.

    The first line decides between JSONL and plain text, so a broken JSON line further down is an error, not a prompt.

    Args:
        source: JSONL in any format of `formats.parse_prompt`, plain text (one prompt a line), parquet, an `hf://`
            address, or `-` for stdin.
        kind: The kind of prompts that have none.
        on_invalid: As in `read_rows`.

    Raises:
        InvalidRow: From `on_invalid`.
        CaiError: The file cannot be read.
    """
    name = display_name(source)

    def parse(value: object) -> Prompt:
        return parse_prompt(value, source=origin(source), kind=kind)

    if source.startswith("hf://") or source.endswith(".parquet"):
        rows = enumerate(_dataset_values(source), start=1)
        yield from _parsed(rows, name, parse, on_invalid, lambda row: orjson.dumps(row, default=str))
        return
    with open_input(source) as stream:
        lines = _lines(stream, name, on_invalid)
        first = next(lines, None)
        if first is None:
            return
        decode = _decode if first[1].lstrip().startswith((b"{", b"[", b'"')) else _text
        yield from _parsed(chain([first], lines), name, lambda line: parse(decode(line)), on_invalid, bytes)


def _text(line: bytes) -> str:
    """A line of plain text as a string.

    Raises:
        RowError: The line is not UTF-8 text.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}", code="invalid-row") from None
    if "\0" in text:
        raise RowError(
            "a NUL byte, which does not occur in plain text", "is this UTF-16 or a binary file?", code="invalid-row"
        )
    return text


def _dataset_values(source: str) -> Iterator[dict[str, Any]]:
    import datasets

    if source.startswith("hf://datasets/"):
        parts = source.removeprefix("hf://datasets/").split("/")
        name, files, hint = "/".join(parts[:2]), "/".join(parts[2:]) or None, "is the Hub reachable?"
    elif Path(source).is_file():
        name, files, hint = "parquet", source, "is it a parquet file?"
    else:
        raise CaiError(f"cannot read {source}: no such file", code="cannot-read")
    try:
        for row in datasets.load_dataset(name, data_files=files, split="train", streaming=True):  # nosec B615
            yield {k: v for k, v in row.items() if v is not None}
    except Exception as error:  # `datasets` lets through the errors of many libraries; the user needs one line
        message = f"cannot read {source}: {' '.join(str(error).split())}"
        raise CaiError(message, hint=hint, code="cannot-read") from error


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
            raise CaiError(
                f"cannot write {self.path}: {error.strerror}",
                hint="finished rows are kept; run the same command again to resume",
                code="cannot-write",
            ) from error

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
