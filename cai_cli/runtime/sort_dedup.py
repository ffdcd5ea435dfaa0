"""`cai sort` and `cai dedup`: sort a JSONL file or remove repeated prompts, with bounded memory.

Sorting writes sorted runs of a bounded size to disk and merges them; de-duplication keeps a hash of each prompt.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from heapq import merge
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from cai_cli.common.hash_index import KeyTable
from cai_cli.data.formats import parse_prompt, row_object, texts_of
from cai_cli.data.jsonl import OnInvalid, raise_invalid, read_rows
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import conversation_id
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.file_transform import rewrite
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import is_stream, sidecar
from cai_cli.runtime.sinks import Sink

RUN_BYTES = 64 * 2**20
LINES_PER_WRITE = 1000
SortKey = tuple[str | int, ...]
Keyed = tuple[SortKey, bytes]


class SortBy(StrEnum):
    """The order of `cai sort`."""

    id = "id"
    length = "length"


def sort_key(by: SortBy) -> Callable[[Any], SortKey]:
    """The sort key of a row. id: rows of one prompt together, in the order of their samples. length: characters of all
    texts in the row."""

    def by_id(row: Any) -> SortKey:
        index = row.get("sample_index")
        return str(row.get("id", "")), index if isinstance(index, int) else 0

    def by_length(row: Any) -> SortKey:
        return (sum(len(text) for _, text in texts_of(row)),)

    return by_id if by is SortBy.id else by_length


def sorted_lines(rows: Iterable[Any], key: Callable[[Any], SortKey], folder: Path) -> Iterator[bytes]:
    """Yield `rows` as JSON lines in the order of `key`; rows with equal keys stay in their order.

    Args:
        rows: JSON objects.
        key: The sort key of a row.
        folder: An empty directory for the sorted runs. At most RUN_BYTES of rows are in memory.
    """
    runs: list[Iterable[Keyed]] = []
    buffered: list[Keyed] = []
    size = 0
    for row in rows:
        line = orjson.dumps(row) + b"\n"
        buffered.append((key(row), line))
        size += len(line)
        if size > RUN_BYTES:
            run = folder / str(len(runs))
            run.write_bytes(b"".join(line for _, line in sorted(buffered, key=_first)))
            runs.append(_run(run, key))
            buffered, size = [], 0
    runs.append(sorted(buffered, key=_first))
    for _, line in merge(*runs, key=_first):
        yield line


def _first(keyed: Keyed) -> SortKey:
    return keyed[0]


def _run(path: Path, key: Callable[[Any], SortKey]) -> Iterator[Keyed]:
    with path.open("rb") as file:
        for line in file:
            yield key(orjson.loads(line)), line


def distinct_lines(rows: Iterable[Any], counts: Counts) -> Iterator[bytes]:
    """Yield the first row of each prompt as a JSON line; the others are counted as skipped."""
    seen = KeyTable()
    for row in rows:
        if seen.add(conversation_id(parse_prompt(row, source="").prompt), 0) is None:
            yield orjson.dumps(row) + b"\n"
        else:
            counts.skipped["same prompt as an earlier line"] += 1


def _with_prompt(value: object) -> dict[str, Any]:
    parse_prompt(value, source="")
    return row_object(value)


def _counted(
    source: str, parse: Callable[[object], dict[str, Any]], counts: Counts, on_invalid: OnInvalid = raise_invalid
) -> Iterator[dict[str, Any]]:
    for _, row in read_rows(source, parse, on_invalid):
        counts.items += 1
        yield row


def _write(sink: Sink, lines: Iterator[bytes]) -> None:
    while group := list(islice(lines, LINES_PER_WRITE)):
        sink.write_lines(group)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """An empty directory for the duration of a sort. Its name beside an output file is fixed, so that the next run
    removes the files of a killed run."""
    if is_stream(str(output)):
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = sidecar(output, "sort")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sort_file(input: str, output: Path, by: SortBy, *, overwrite: bool, as_json: bool) -> None:
    """Write the rows of `input` to `output` in order, and print the summary. Raises CaiError."""
    inputs = {"rows": hash_input(input)}

    def fill(sink: Sink, counts: Counts) -> None:
        with _scratch(output) as folder:
            _write(sink, sorted_lines(_counted(input, row_object, counts), sort_key(by), folder))

    made_by = provenance("sort", inputs=inputs, settings={"by": by.value})
    rewrite(output, made_by, inputs, fill, overwrite=overwrite, as_json=as_json)


def dedup_file(input: str, output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Write the first row of each prompt to `output`, and print the summary. Raises CaiError."""
    inputs = {"rows": hash_input(input)}
    reader = RowReader(skip_invalid=None)

    def fill(sink: Sink, counts: Counts) -> None:
        _write(sink, distinct_lines(_counted(input, _with_prompt, counts, reader.on_invalid), counts))
        rejected = reader.take_invalid()
        sink.write(rejected)
        counts.items += len(rejected)

    made_by = provenance("dedup", inputs=inputs, settings={})
    rewrite(output, made_by, inputs, fill, overwrite=overwrite, as_json=as_json)
