"""Reads tables: CSV and TSV with a header, and parquet. Each row is an object of its columns."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cai_cli.common.errors import CaiError, InvalidRow, RowError
from cai_cli.data import lines
from cai_cli.data.lines import Numbered, OnInvalid

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_BATCH = 500  # rows
EMPTY_IS_MISSING = ("id", "kind", "source")


def parquet_rows(path: str) -> Iterator[Numbered[dict[str, Any]]]:
    """(number from 1, row without its nulls) of a parquet file.

    Raises:
        CaiError: The file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise CaiError(f"cannot read {path}: no such file", code="cannot-read")
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        message = f"cannot read {path}: {' '.join(str(error).split())}"
        raise CaiError(message, hint="is it a parquet file?", code="cannot-read") from error


def table_rows(stream: BinaryIO, name: str, ending: str, on_invalid: OnInvalid) -> Iterator[Numbered[dict[str, str]]]:
    """(line on which it ends, cells by column) of a CSV or TSV file. Its first line names the columns.

    Args:
        stream: The file.
        name: Its name, for errors.
        ending: `.csv` or `.tsv`.
        on_invalid: Called for a row with too few or too many cells, or with broken quotes.

    Raises:
        CaiError: The header is missing or names a column twice.
    """
    csv.field_size_limit(lines.MAX_LINE_BYTES)
    text = _Lines(stream, name)
    first = next(text, None)
    if first is None:
        return
    cells = csv.reader(_Chained(first, text), delimiter=_delimiter(first, ending), strict=True)
    header = next(cells, [])
    repeated = {column for column in header if header.count(column) > 1}
    if repeated or not any(header):
        what = f"names the column {min(repeated)!r} twice" if repeated else "names no columns"
        raise CaiError(f"{name}: the first line {what}", "the first line is the header", code="cannot-read")
    while True:
        text.row = []
        try:
            row = next(cells, None)
            if row is None:
                return
            if row:
                yield cells.line_num, _by_column(header, row)
        except csv.Error as error:
            on_invalid(
                InvalidRow(name, cells.line_num, f"not {ending[1:].upper()}: {error}"),
                "".join(text.row).encode("utf-8", "surrogateescape"),
            )
        except RowError as error:
            on_invalid(
                InvalidRow(name, cells.line_num, error.message, error.hint),
                "".join(text.row).encode("utf-8", "surrogateescape"),
            )


def _by_column(header: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise RowError(f"{len(row)} cells, where the header has {len(header)}")
    for cell in row:
        if "\udc80" <= max(cell, default="") <= "\udcff":
            raise RowError("not UTF-8")
    found = dict(zip(header, row, strict=True))
    return {column: cell for column, cell in found.items() if cell or column not in EMPTY_IS_MISSING}


def _delimiter(header: str, ending: str) -> str:
    if ending == ".csv" and "," not in header:
        return next((other for other in ";\t" if other in header), ",")
    return DELIMITERS.get(ending, ",")


class _Lines(Iterator[str]):
    """The lines of a stream as text. `row` holds those of the row in progress, whose length is limited."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.row: list[str] = []
        self.number = 0

    def __next__(self) -> str:
        line = lines.read_line(self.stream, self.name, lines.MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            lines.refuse_compressed(line, self.name)
            line = line.removeprefix(lines.BYTE_ORDER_MARK)
        text = line.decode("utf-8", "surrogateescape")
        self.row.append(text)
        if len(line) > lines.MAX_LINE_BYTES or sum(map(len, self.row)) > lines.MAX_LINE_BYTES:
            reason = f"a row longer than {lines.MAX_LINE_BYTES >> 20} MiB"
            raise InvalidRow(self.name, self.number, reason, "is a quote missing before it?")
        return text


class _Chained(Iterator[str]):
    """The header line and the lines after it."""

    def __init__(self, first: str, rest: Iterator[str]) -> None:
        self.first: str | None = first
        self.rest = rest

    def __next__(self) -> str:
        if self.first is not None:
            first, self.first = self.first, None
            return first
        return next(self.rest)
