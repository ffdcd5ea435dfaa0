"""Reads the lines of an input: opens and decompresses it, limits the length of a line, and parses JSON strictly.

Lines end at b"\\n" only (U+2028 is content), and their length is limited before they are parsed. jsonlines decodes
them with orjson as its parser, which refuses NaN, lone surrogates and deep nesting. Repeated keys in one object are an
error.
"""

import codecs
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jsonlines
import orjson

from cai_cli.common.errors import CaiError, InvalidRow, RowError

T = TypeVar("T")
MAX_LINE_BYTES = 64 * 2**20
KEPT_OF_LONG_LINE = 4096
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04", "parquet": b"PAR1"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEY_END = re.compile(rb'"[ \t\r]*:')
Numbered = tuple[int, T]
OnInvalid = Callable[[InvalidRow, bytes], None]


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
    """The `source` of rows that have none: the name of their file or data set, without its folders."""
    name = source.partition("?")[0] if source.startswith("hf://") else display_name(source)
    return Path(name).name


def raise_invalid(error: InvalidRow, _raw: bytes) -> None:
    """The default for invalid lines: reading stops at the first one.

    Raises:
        InvalidRow: Always.
    """
    raise error from None


def skip_unusable(error: InvalidRow, _raw: bytes) -> None:
    """For commands without a rejected file: rows that no command can use are left out, an invalid one stops.

    Raises:
        InvalidRow: The row is not valid.
    """
    if error.code != "unusable-row":
        raise error from None


def lines_of(
    stream: BinaryIO, name: str, on_invalid: OnInvalid, head: Sequence[bytes] = (), first: int = 1
) -> Iterator[Numbered[bytes]]:
    """(number, bytes without the line end) of every line that is not blank.

    Args:
        stream: The input.
        name: Its name, for errors.
        on_invalid: Called for each line that is too long.
        head: Lines that were read from the stream already; only the last one may lack its end.
        first: The number of the first line.
    """
    waiting, number = list(head), first - 1
    while line := _next_line(stream, name, waiting):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > MAX_LINE_BYTES:
            reason = f"a line longer than {MAX_LINE_BYTES >> 20} MiB (its first {KEPT_OF_LONG_LINE:,} bytes are kept)"
            kept = line[: codecs.utf_8_decode(line[:KEPT_OF_LONG_LINE], "replace", False)[1]]
            on_invalid(InvalidRow(name, number, reason, "is this a JSONL file?", code="invalid-row"), kept)
            while line and not line.endswith(b"\n"):
                line = read_line(stream, name, 1 << 20)
            continue
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield number, line


def _next_line(stream: BinaryIO, name: str, waiting: list[bytes]) -> bytes:
    """The next line, of at most MAX_LINE_BYTES + 1 bytes."""
    if not waiting:
        return read_line(stream, name, MAX_LINE_BYTES + 1)
    line = waiting.pop(0)
    if not waiting and not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
        line += read_line(stream, name, MAX_LINE_BYTES + 1 - len(line))
    return line


def read_line(stream: BinaryIO, name: str, size: int) -> bytes:
    """The next line, or its first `size` bytes. Raises CaiError `cannot-read`."""
    try:
        return stream.readline(size)
    except OSError as error:
        raise cannot_read(name, error) from error


def cannot_read(name: str, error: OSError) -> CaiError:
    """The error for an input that fails while it is read."""
    return CaiError(f"cannot read {name}: {error.strerror or error}", hint="is the file complete?", code="cannot-read")


def refuse_compressed(start: bytes, name: str) -> None:
    """Raises CaiError `cannot-read` when the first bytes of an input are those of a binary format."""
    for kind, magic in MAGIC.items():
        if start.startswith(magic):
            raise CaiError(
                f"{name} is {kind} data, not JSON lines",
                hint="decompress it, or give it the ending .gz, .zst or .parquet",
                code="cannot-read",
            )


def decode_json(line: bytes) -> Any:
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


def decode_text(line: bytes) -> str:
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
