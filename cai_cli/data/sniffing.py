"""Tells from the first lines of an input whether it is JSONL, a JSON array, printed JSON objects, CSV or plain text."""

import re
from collections.abc import Sequence
from enum import Enum

from cai_cli.common.errors import RowError
from cai_cli.data.foreign.turns import is_conversation
from cai_cli.data.lines import decode_json

LOOK_AHEAD = 8  # lines, where the first one does not decide
JSON_ENDINGS = frozenset({".jsonl", ".ndjson", ".json"})
_ARRAY = re.compile(rb"\[\s*(?:$|[\[{'\]]|\"(?:[^\"\\]|\\.)*\"\s*(?:,|\]|$))")
_OBJECT = re.compile(rb"\{\s*(?:$|[\"'}])")
_QUOTED_CELLS = re.compile(rb'"[^"]*"(?:[,;\t]"[^"]*")+\s*$')


class Layout(Enum):
    """How the rows of an input are laid out."""

    LINES = "one JSON value a line"
    ARRAY = "one JSON array"
    OBJECTS = "JSON objects over several lines"
    TEXT = "plain text, one prompt a line"
    CELLS = "cells in quotes, as in a CSV file"


def needs_more_lines(first: bytes) -> bool:
    """Whether the first line alone does not tell the layout."""
    return first.lstrip().startswith(b'"') or _goes_on(first.strip())


def layout_of(lines: Sequence[bytes], ending: str) -> Layout:
    """The layout of an input.

    Args:
        lines: Its first lines that are not blank; where `needs_more_lines` says so, up to LOOK_AHEAD of them. The last
            one may be cut off.
        ending: The ending of its name, without that of a compression.
    """
    first = lines[0].strip()
    if first.startswith(b"["):
        return _layout_of_list(lines[0], ending)
    if first.startswith(b"{"):
        return _layout_of_object(lines, ending)
    if not first.startswith(b'"'):
        return Layout.TEXT
    if ending in JSON_ENDINGS or all(map(_is_json, lines)):
        return Layout.LINES
    return Layout.CELLS if _QUOTED_CELLS.match(first) else Layout.TEXT


def _layout_of_object(lines: Sequence[bytes], ending: str) -> Layout:
    first, second = lines[0].strip(), lines[1].strip() if len(lines) > 1 else b""
    if _is_json(first) or not lines[0].endswith(b"\n"):
        return Layout.LINES
    # After `{` and `,` comes a key; a row there means that the first line is a row that is cut off.
    if _goes_on(first) and (first.endswith((b"[", b":")) or second.startswith((b'"', b"}"))):
        return Layout.OBJECTS
    return Layout.LINES if _OBJECT.match(first) or ending in JSON_ENDINGS else Layout.TEXT


def _layout_of_list(line: bytes, ending: str) -> Layout:
    first = line.strip()
    if not _ARRAY.match(first[:1_000_000]):
        return Layout.LINES if ending in JSON_ENDINGS else Layout.TEXT
    try:
        value = decode_json(first)
    except RowError:
        return Layout.ARRAY
    if is_conversation(value) or (value and not any(isinstance(each, dict) for each in value)):
        return Layout.LINES  # a row that is a list of messages, or not a row at all
    return Layout.ARRAY


def _is_json(line: bytes) -> bool:
    try:
        decode_json(line.strip())
    except RowError as error:
        return "occurs twice" in error.message
    return True


def _goes_on(first: bytes) -> bool:
    """Whether a line is the start of a JSON object that goes on in the next line, as printers break it."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", first)
    return b'"' not in outside and bool(_OBJECT.match(first)) and outside.rstrip().endswith((b"{", b"[", b",", b":"))
