"""Rows in, rows out: byte-level reading with file and line in every error, and outputs that survive a kill.

Reading splits on b"\\n" only (U+2028 is content) and caps the length of a line before parsing it; jsonlines does the
decoding with orjson as its one parser, which refuses NaN, lone surrogates and deep nesting; a key that stands twice in
one object is refused too.

Writing appends whole windows of rows to `OUT.partial` with one write each, and renames it to `OUT` when it is whole.
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
from cai_cli.data.formats import parse_prompt
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
    """`source` as a byte stream; `-` is stdin, names in .gz and .zst are decompressed. Raises CaiError when it cannot
    be read."""
    if source == "-":
        yield sys.stdin.buffer
        return
    path = Path(source)
    if path.is_dir():
        raise CaiError(f"{source} is a directory, not a JSONL file", hint="name the file inside it")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CaiError(f"cannot read {source}: {error.strerror}") from error
    with stream:
        yield _decompressed(stream, source) if path.suffix in COMPRESSED else stream


def _decompressed(stream: io.BufferedReader, name: str) -> BinaryIO:
    import pyarrow

    kind = COMPRESSED[Path(name).suffix]
    if not stream.peek(4).startswith(MAGIC[kind]):
        raise CaiError(f"{name} is not {kind} data, as its ending says", hint="give it the ending of what it holds")
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, kind))


def display_name(source: str) -> str:
    """`source` as messages name it."""
    return "stdin" if source == "-" else source


def origin(source: str) -> str:
    """The `source` of rows that name none: their file without its folders, which are this machine's."""
    return Path(display_name(source)).name


def stop(error: InvalidRow, _raw: bytes) -> None:
    """What becomes of a line that is no row, unless the caller says otherwise: the first one ends the reading."""
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
            on_invalid(InvalidRow(name, number, reason, "is this a JSONL file?"), kept)
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
        raise CaiError(f"cannot read {name}: {error.strerror or error}", hint="is the file whole?") from error


def _refuse_compressed(start: bytes, name: str) -> None:
    for kind, magic in MAGIC.items():
        if start.startswith(magic):
            raise CaiError(
                f"{name} is {kind} data, not JSON lines",
                hint="decompress it first; .gz, .zst and .parquet files are read when they are named so",
            )


def _decode(line: bytes) -> Any:
    """The JSON value of a line. Raises RowError."""
    try:
        value = jsonlines.Reader([line], loads=orjson.loads).read(allow_none=True)
    except jsonlines.InvalidLineError as error:
        cause = error.__cause__
        # Its own "line 1" would only confuse: the line of the file is named already.
        where = f"{cause.msg} at character {cause.pos + 1}" if isinstance(cause, orjson.JSONDecodeError) else cause
        raise RowError(f"not JSON: {where or error}", "one JSON object a line, UTF-8") from None
    if len(_KEY_END.findall(line)) > _keys_in(value):
        _refuse_repeated_keys(line)
    return value


def _keys_in(value: object) -> int:
    keys, waiting = 0, [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            keys += len(inner)
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
    return keys


def _refuse_repeated_keys(line: bytes) -> None:
    """orjson takes the last of two equal keys in silence. Every key ends with a quote and a colon, so a line with no
    more of those than keys repeats none; only the others come here, to be parsed once more by the slower parser."""

    def distinct(pairs: list[tuple[str, object]]) -> None:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise RowError(f"field {key!r} stands twice in one object")

    try:
        json.loads(line, object_pairs_hook=distinct, parse_int=str, parse_float=str)
    except RecursionError:
        raise RowError("nested too deeply") from None


def read_values(source: str) -> Iterator[Numbered[Any]]:
    """(line number from 1, parsed JSON) of every non-blank line. Raises InvalidRow at the first that is not JSON."""
    yield from read_rows(source, lambda value: value)


def read_rows(source: str, parse: Callable[[object], T], on_invalid: OnInvalid = stop) -> Iterator[Numbered[T]]:
    """(line number, row) of every line. A line that is not JSON, or that `parse` refuses with RowError, goes to
    `on_invalid` as a InvalidRow with file and line, beside its bytes."""
    name = display_name(source)
    with open_input(source) as stream:
        yield from _parsed(_lines(stream, name, on_invalid), name, lambda line: parse(_decode(line)), on_invalid, bytes)


def _parsed(
    given: Iterable[Numbered[S]],
    name: str,
    parse: Callable[[S], T],
    on_invalid: OnInvalid,
    raw: Callable[[S], bytes],
) -> Iterator[Numbered[T]]:
    for number, value in given:
        try:
            row = parse(value)
        except RowError as error:
            on_invalid(InvalidRow(name, number, error.message, error.hint), raw(value))
            continue
        yield number, row


def rows_of(row_type: type[R]) -> Callable[[object], R]:
    """A parser for `read_rows` of one of our own row types."""
    return lambda value: load_row(row_type, value)


def read_prompts(source: str, kind: Kind | None = None, on_invalid: OnInvalid = stop) -> Iterator[Numbered[Prompt]]:
    """Prompts in any accepted form (`forms.parse_prompt`): JSONL, plain text (one prompt a line), parquet, hf://.

    The first line decides between JSONL and plain text, so a broken JSON line later is an error and not a prompt.
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
    """A line of plain text. Raises RowError."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise RowError("a NUL byte, which plain text does not hold", "is this UTF-16, or no text at all?")
    return text


def _dataset_values(source: str) -> Iterator[dict[str, Any]]:
    import datasets

    if source.startswith("hf://datasets/"):
        parts = source.removeprefix("hf://datasets/").split("/")
        name, files, hint = "/".join(parts[:2]), "/".join(parts[2:]) or None, "is the hub reachable from here?"
    elif Path(source).is_file():
        name, files, hint = "parquet", source, "is it a parquet file?"
    else:
        raise CaiError(f"cannot read {source}: no such file")
    try:
        for row in datasets.load_dataset(name, data_files=files, split="train", streaming=True):  # nosec B615
            yield {k: v for k, v in row.items() if v is not None}
    except Exception as error:  # the libraries below raise many kinds; the user needs one line
        raise CaiError(f"cannot read {source}: {' '.join(str(error).split())}", hint=hint) from error


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawLine:
    """A row of ours as it stood in a file, whatever its type."""

    key: str
    data: bytes


class AppendFile:
    """A JSONL file being appended to, a group of rows in one write, synced to disk with every group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None

    def finished_keys(self) -> Iterator[str]:
        """Cut a torn last line away, then yield the key of every row that is there."""
        if not self.path.exists():
            return
        cut_torn_tail(self.path)
        for _, value in read_values(str(self.path)):
            yield row_key(value)

    def rows(self) -> Iterator[RawLine | Rejected]:
        """Cut a torn last line away, then yield every row that is there."""
        if not self.path.exists():
            return
        cut_torn_tail(self.path)
        for _, value in read_values(str(self.path)):
            yield load_row(Rejected, value) if "key" in value else RawLine(row_key(value), orjson.dumps(value))

    def append(self, rows: Iterable[Row | RawLine]) -> None:
        self.append_lines((row.data if isinstance(row, RawLine) else dump_row(row)) + b"\n" for row in rows)

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """`lines` with their newlines. Raises CaiError."""
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
                f"cannot write {self.path}: {error.strerror}", hint="what is written is kept; run again to go on"
            ) from error

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def row_key(value: dict[str, Any]) -> str:
    """The key of one of our own rows without validating it (see `Row.key`)."""
    if "key" in value:
        return str(value["key"])
    if "sample_index" in value and "model_a" not in value:  # a Duel's id has both already
        return f"{value['id']}/{value['sample_index']}"
    return str(value["id"])


def cut_torn_tail(path: Path) -> int:
    """Truncate `path` after its last whole line; returns how many bytes were cut."""
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
    """Make a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
