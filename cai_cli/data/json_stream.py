"""Splits a stream of JSON into its rows: the elements of one array, or objects printed over several lines.

Rows are cut out by their brackets and strings alone, one at a time and never longer than a line may be; `lines`
parses each of them. Memory does not depend on the number of rows.
"""

import re
from collections.abc import Iterable, Iterator

from cai_cli.common.errors import InvalidRow
from cai_cli.data import lines
from cai_cli.data.lines import Numbered

# A complete string, a bracket, a comma, or the start of a string that goes on in the next block.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]|"', re.DOTALL)
_BLANK = b" \t\r\n"


class JsonSplitter:
    """Cuts rows out of blocks of bytes.

    Args:
        name: The name of the input, for errors.
        in_array: Whether the rows are the elements of one array; else they are objects one after the other.
    """

    def __init__(self, name: str, *, in_array: bool) -> None:
        self.name, self.level = name, int(in_array)
        self.depth = 0
        self.buffer = b""
        self.at = 0  # in the buffer: what is before is part of no token
        self.start = 0  # in the buffer: the row in progress
        self.line = 1  # of `start`
        self.closed = self.after_comma = False

    def rows(self, blocks: Iterable[bytes], first_line: int) -> Iterator[Numbered[bytes]]:
        """(line on which it starts, bytes) of every row.

        Args:
            blocks: The input in pieces of any size.
            first_line: The number of its first line.

        Raises:
            InvalidRow: The input ends within a row, goes on after its array, or has a row that is too long.
        """
        self.line = first_line
        for block in blocks:
            self.buffer += block
            yield from self._scan(last=False)
            self._forget()
        yield from self._scan(last=True)
        rest = self.buffer[self.start :]
        if self.depth or rest.strip(_BLANK):
            raise self._invalid("not JSON: unexpected end of data" if self.depth else "not a JSON object or array")

    def _scan(self, *, last: bool) -> Iterator[Numbered[bytes]]:
        for token in _TOKEN.finditer(self.buffer, self.at):
            text = token.group()
            if text == b'"' and not last:
                self.at = token.start()  # its end is in a later block
                return
            self.at = token.end()
            if text in (b"[", b"{"):
                self._open(token.start())
            elif text in (b"]", b"}"):
                if row := self._close(token):
                    yield row
            elif text == b"," and self.depth == self.level == 1:
                if (row := self._cut(token.start(), token.end())) is None:
                    raise self._invalid("not JSON: a comma without a value before it")
                self.after_comma = True
                yield row

    def _open(self, at: int) -> None:
        if self.depth == 0 and self.closed:
            raise self._invalid("a JSON array is followed by something else")
        if self.depth == 0 and self.level == 0:
            self._skip(at)
        self.depth += 1
        if self.depth == self.level == 1:
            self._skip(at + 1)

    def _close(self, token: "re.Match[bytes]") -> Numbered[bytes] | None:
        self.depth -= 1
        if self.depth < 0:
            raise self._invalid("not JSON: a closing bracket without its opening one")
        if self.level == 0 and self.depth == 0:
            return self._cut(token.end(), token.end())
        if self.level == 1 and self.depth == 0:
            self.closed = True
            row = self._cut(token.start(), token.end())
            if row is None and self.after_comma:
                raise self._invalid("not JSON: a comma without a value after it")
            return row
        return None

    def _cut(self, end: int, resume: int) -> Numbered[bytes] | None:
        """The row in progress, up to `end`; the next one starts at `resume`."""
        row = self.buffer[self.start : end]
        leading = len(row) - len(row.lstrip(_BLANK))
        number = self.line + row.count(b"\n", 0, leading)
        self.line += self.buffer.count(b"\n", self.start, resume)
        self.start = resume
        row = row.strip(_BLANK)
        return (number, row) if row else None

    def _skip(self, to: int) -> None:
        """Start a row at `to`; what is before it must be blank."""
        between = self.buffer[self.start : to].strip(b" \t\r\n[") if self.level else self.buffer[self.start : to]
        if between.strip(_BLANK):
            raise self._invalid("not JSON: text between two rows")
        self.line += self.buffer.count(b"\n", self.start, to)
        self.start = to

    def _forget(self) -> None:
        """Drop the bytes before the row in progress, and refuse a row that is too long."""
        if len(self.buffer) - self.start > lines.MAX_LINE_BYTES:
            raise self._invalid(f"a row longer than {lines.MAX_LINE_BYTES >> 20} MiB")
        self.buffer, self.at, self.start = self.buffer[self.start :], max(0, self.at - self.start), 0

    def _invalid(self, reason: str) -> InvalidRow:
        rest = self.buffer[self.start : self.start + 65536]
        blank = len(rest) - len(rest.lstrip(_BLANK))
        return InvalidRow(
            self.name,
            self.line + rest.count(b"\n", 0, blank),
            reason,
            "is this a JSON or JSONL file?",
            code="invalid-row",
        )
