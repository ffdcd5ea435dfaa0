"""Opens an input of any format as a stream of rows: by its ending and its first lines."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.data import lines
from cai_cli.data.hub import hub_rows
from cai_cli.data.json_stream import JsonSplitter
from cai_cli.data.lines import COMPRESSED, Numbered, OnInvalid, decode_json, decode_text, lines_of, open_input
from cai_cli.data.sniffing import LOOK_AHEAD, Layout, layout_of, needs_more_lines
from cai_cli.data.tables import DELIMITERS, parquet_rows, table_rows

HEAD_BYTES = 2**20  # of a line that is looked at before it is known what it is
BLOCK = 2**20
NOT_ROWS = {
    **dict.fromkeys((".yaml", ".yml"), "a YAML file; a constitution is given with --constitution"),
    **dict.fromkeys((".md", ".html", ".xml", ".py", ".toml", ".ini"), "not a file of rows or prompts"),
    **dict.fromkeys((".xlsx", ".ods", ".docx", ".pdf"), "a document; save it as CSV"),
}


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what (`--column`).

    Attributes:
        names: The column by our name of what it holds, such as {"prompt": "goal"}.
    """

    names: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Columns":
        """Parse `NAME` for the prompt, or `prompt=NAME,completion=NAME,...`. Raises UsageError.

        >>> Columns.parse("goal").names, Columns.parse("prompt=q,completion=a").names
        ({'prompt': 'goal'}, {'prompt': 'q', 'completion': 'a'})
        """
        names: dict[str, str] = {}
        for part in text.split(",") if "=" in text else [f"prompt={text}"]:
            ours, found, theirs = part.partition("=")
            if not found or ours.strip() not in PARTS or not theirs.strip() or ours.strip() in names:
                hint = f"write NAME or PART=NAME,PART=NAME; parts: {', '.join(PARTS)}"
                raise UsageError(f"--column {text!r}: {part!r} is not a part of a row", hint, code="invalid-option")
            names[ours.strip()] = theirs.strip()
        return cls(names)

    def pick(self, value: Any) -> Any:
        """A row with its columns under our names; the others keep theirs. Raises RowError."""
        if not isinstance(value, dict):
            raise RowError("a row without columns, where --column names one", code="invalid-row")
        missing = [theirs for theirs in self.names.values() if theirs not in value]
        if missing:
            columns = ", ".join(str(name)[:40] for name in list(value)[:12])
            raise RowError(f"no column {missing[0]!r}; its columns are {columns}", "see --column", code="invalid-row")
        rest = {k: v for k, v in value.items() if k not in self.names.values()}
        if "prompt" in self.names:  # the named column takes precedence over a conversation beside it
            rest = {k: v for k, v in rest.items() if k not in CONVERSATIONS}
        return rest | {ours: value[theirs] for ours, theirs in self.names.items()}


CONVERSATIONS = frozenset({"messages", "conversations", "conversation", "instruction", "question"})
PARTS = ("prompt", "completion", "messages", "chosen", "rejected", "id", "kind", "source")


@dataclass(frozen=True)
class Rows:
    """The rows of an input before they are parsed.

    Attributes:
        values: (line number from 1, value) in order.
        decode: The JSON value of such a value. Raises RowError.
        raw: Its bytes, for the rejected file.
        layout: How they are laid out; None for tables and the Hub.
    """

    values: Iterator[Numbered[Any]]
    decode: Callable[[Any], Any]
    raw: Callable[[Any], bytes]
    layout: Layout | None = None


def ending_of(source: str) -> str:
    """The ending of a name, in lower case, without that of a compression."""
    path = Path(source)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


@contextmanager
def open_rows(
    source: str, on_invalid: OnInvalid, *, text: bool = False, columns: Columns | None = None
) -> Iterator[Rows]:
    """The rows of an input.

    Args:
        source: JSONL, JSON (an array, or printed objects), CSV, TSV, parquet, an `hf://` address, `-` for stdin; with
            `text` also plain text.
        on_invalid: Called for lines that cannot be cut into rows.
        text: Whether plain text is an input too.
        columns: Which columns hold what. An input without an ending that starts like no JSON is a CSV file then.

    Raises:
        CaiError: The input cannot be read, or has another format.
    """
    if source.startswith("hf://"):
        yield _objects(hub_rows(source))
        return
    ending, name = ending_of(source), lines.display_name(source)
    if ending == ".parquet":
        yield _objects(parquet_rows(source))
        return
    if text and ending in NOT_ROWS:
        raise CaiError(f"{name} is {NOT_ROWS[ending]}", "is it the right file?", code="cannot-read")
    with open_input(source) as stream:
        if ending in DELIMITERS:
            yield _objects(table_rows(stream, name, ending, on_invalid))
            return
        head, first = _head(stream, name)
        layout = layout_of([line for line in head if line.strip()], ending) if head else Layout.LINES
        if layout is Layout.CELLS and text:
            raise CaiError(f"{name} looks like a CSV file", "give it the ending .csv or .tsv", code="cannot-read")
        if layout in (Layout.ARRAY, Layout.OBJECTS):
            yield _printed(stream, name, layout, head, first)
            return
        plain = text and layout is Layout.TEXT and bool(head)
        if plain:
            console.say(f"{name}: plain text, {_prompts_in(source)}")
        decode = decode_text if plain else decode_json
        yield Rows(lines_of(stream, name, on_invalid, head, first), decode, bytes, Layout.TEXT if plain else layout)


def _prompts_in(source: str) -> str:
    """How many prompts a file of plain text makes of how many lines; a stream is not counted."""
    path = Path(source)
    if not path.is_file() or path.suffix in COMPRESSED:
        return "one prompt a line"
    number = prompts = 0
    start = blank = True
    with path.open("rb") as file:
        for piece in iter(lambda: file.readline(HEAD_BYTES), b""):  # a long line comes in several pieces
            number += start
            blank = (start or blank) and not piece.strip()
            start = piece.endswith(b"\n")
            prompts += start and not blank
        prompts += not start and not blank
    return f"one prompt a line: {prompts:,} prompts of {number:,} lines"


def _objects(rows: Iterator[Numbered[dict[str, Any]]]) -> Rows:
    return Rows(rows, lambda value: value, lambda value: orjson.dumps(value, default=str))


def _head(stream: BinaryIO, name: str) -> tuple[list[bytes], int]:
    """The first lines that are not blank, as many as are needed to tell the layout, and the number of the first one."""
    first = 1
    while (line := lines.read_line(stream, name, HEAD_BYTES)) and not line.strip(b" \t\r\n\xef\xbb\xbf"):
        first += line.endswith(b"\n")
    if not line:
        return [], first
    if first == 1:
        lines.refuse_compressed(line, name)
        line = line.removeprefix(lines.BYTE_ORDER_MARK)
    head = [line]
    while needs_more_lines(line) and len(head) < LOOK_AHEAD and head[-1].endswith(b"\n"):
        if not (more := lines.read_line(stream, name, HEAD_BYTES)):
            break
        head.append(more)
    return head, first


def _printed(stream: BinaryIO, name: str, layout: Layout, head: list[bytes], first: int) -> Rows:
    """The rows of one JSON array, or of objects over several lines."""
    splitter = JsonSplitter(name, in_array=layout is Layout.ARRAY)
    blocks = chain(head, iter(lambda: _read_block(stream, name), b""))
    return Rows(splitter.rows(blocks, first), decode_json, bytes, layout)


def _read_block(stream: BinaryIO, name: str) -> bytes:
    try:
        return stream.read(BLOCK)
    except OSError as error:
        raise lines.cannot_read(name, error) from error
