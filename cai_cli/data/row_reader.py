"""Reads a stage's input: the rows of its shard, up to a limit, and the invalid lines.

By default the first invalid line stops the run with its file and line. With `--skip-invalid` invalid lines are written
to the rejected file and counted like every other rejected row.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.data.dropped import Dropped
from cai_cli.data.jsonl import MAX_LINE_BYTES, Numbered, read_prompts, read_rows
from cai_cli.data.schema import Identified, Kind, Prompt, Rejected, dump_row
from cai_cli.data.sharding import Shard
from cai_cli.data.sources import Columns

R = TypeVar("R", bound=Identified)


class ChangedRows(CaiError):
    """The first rows of an input are not those that its reader was told to expect."""


class RowReader:
    """Reads the input rows of a stage and collects invalid lines as rejected rows.

    Args:
        shard: `I/N` to read one shard only, else None.
        skip_invalid: Whether to continue after invalid lines. None stops at the first one, as False does, and is for
            commands without the option: the error does not mention it.
        max_invalid: The number of invalid lines after which the run stops anyway; None for no limit.
        columns: Which columns hold what (`--column`), or None.

    Attributes:
        dropped: The columns that were left out of the rows read so far.
        invalid: The invalid lines read so far and not yet taken, as (line number, rejected row), in order.

    Raises:
        UsageError: `max_invalid` without `skip_invalid`, or an invalid `shard`.
    """

    def __init__(
        self,
        shard: str | None = None,
        *,
        skip_invalid: bool | None = False,
        max_invalid: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        if max_invalid is not None and not skip_invalid:
            raise UsageError("--max-invalid needs --skip-invalid", hint="give both", code="option-conflict")
        self.shard = Shard.parse(shard) if shard else None
        self.skip_invalid, self.max_invalid = skip_invalid, max_invalid
        self.columns, self.dropped = columns, Dropped()
        self._expected: tuple[int, str] | None = None
        self.invalid: deque[Numbered[Rejected]] = deque()
        self.invalid_bytes = 0  # of the lines in `invalid`
        self._start()

    def expect(self, rows: Mapping[str, Any]) -> None:
        """Require that the input starts with these rows, given by their count and SHA-256 (`digest_so_far`).

        Reading raises ChangedRows before it yields a row after them; `met_expected` tells whether they were all read.
        """
        self._expected = (int(rows["count"]), str(rows["sha256"]))

    def _start(self) -> None:
        self.met_expected = self._expected is None
        self.dropped.counts.clear()
        self.digest, self.count, self.invalid_count = hashlib.sha256(), 0, 0

    def rows(self, source: str, parse: Callable[[object], R], limit: int | None = None) -> Iterator[Numbered[R]]:
        """The rows of this shard among the first `limit` rows of a file.

        Args:
            source: A JSONL file, or `-` for stdin.
            parse: Turns a JSON value into a row. Raises RowError for an invalid one.
            limit: The number of valid rows to read; None reads all.

        Returns:
            (line number from 1, row) in file order.

        Raises:
            InvalidRow: A line is not a valid row, and `skip_invalid` is off.
            CaiError: The file cannot be read, or there are more invalid lines than `max_invalid`.
        """
        self._start()
        return self._in_shard(islice(read_rows(source, parse, self.on_invalid, columns=self.columns), limit))

    def prompts(
        self, source: str, kind: Kind | None = None, limit: int | None = None, *, rubrics: bool = False
    ) -> Iterator[Numbered[Prompt]]:
        """As `rows`, for prompts in any accepted format; `kind` is the kind of prompts that have none, and with
        `rubrics` rows with a rubric become RubricPrompts."""
        self._start()
        rows = read_prompts(source, kind, self.on_invalid, columns=self.columns, dropped=self.dropped, rubrics=rubrics)
        return self._in_shard(islice(rows, limit))

    def digest_so_far(self) -> dict[str, Any]:
        """The count and SHA-256 of the rows and invalid lines read so far, of all shards."""
        return {"count": self.count, "sha256": self.digest.hexdigest()}

    def invalid_before(self, line: float = math.inf) -> Iterator[Numbered[Rejected]]:
        """Take the invalid lines before line number `line` out of `invalid`."""
        self.invalid_bytes = 0
        while self.invalid and self.invalid[0][0] < line:
            yield self.invalid.popleft()

    def take_invalid(self) -> list[Rejected]:
        """Take all invalid lines, in stages that read their whole input before they start."""
        return [row for _, row in self.invalid_before()]

    def _in_shard(self, rows: Iterator[Numbered[R]]) -> Iterator[Numbered[R]]:
        for line, row in rows:
            if not self.met_expected:
                self._compare(more=True)
            self.count += 1
            self.digest.update(dump_row(row) + b"\n")
            if self.shard is None or self.shard.contains(row.id):
                yield line, row
        if not self.met_expected:
            self._compare(more=False)

    def _compare(self, *, more: bool) -> None:
        """Compare what was read so far with the expected rows, when as many were read. `more`: a row follows."""
        count, sha256 = self._expected or (0, "")
        self.met_expected = self.count == count and self.digest.hexdigest() == sha256
        if not self.met_expected and (not more or self.count >= count):
            raise self.changed_rows()

    def changed_rows(self) -> ChangedRows:
        """The error for an input that does not start with the expected rows."""
        count = self._expected[0] if self._expected else 0
        return ChangedRows(
            f"the first {count:,} rows of the input are not those that the output was made from",
            hint="--overwrite starts from scratch; or choose another -o",
            code="other-run",
        )

    def on_invalid(self, error: InvalidRow, raw: bytes) -> None:
        """Collect an unusable row, or an invalid one with `skip_invalid`, in `invalid`. Raises InvalidRow, CaiError."""
        if error.code == "unusable-row":
            self._count_line(raw)
            self._reject(error, raw, error.reason)
            return
        if not self.skip_invalid:
            hints = [error.hint] if error.hint else []
            if self.skip_invalid is not None:
                hints.append("--skip-invalid continues and writes such lines to the rejected file")
            hint = "; ".join(hints) or None
            raise InvalidRow(error.file, error.line, error.reason, hint, code=error.code) from None
        self.invalid_count += 1
        self._count_line(raw)
        if self.max_invalid is not None and self.invalid_count > self.max_invalid:
            raise CaiError(
                f"more than {self.max_invalid:,} invalid lines; the last one: {error.message}",
                hint="fix the input, or allow more with --max-invalid",
                code="invalid-row",
            )
        self._reject(error, raw, f"bad line: {Path(error.file).name}:{error.line}: {error.reason}")

    def _count_line(self, raw: bytes) -> None:
        """Add a line that is not a row to what was read. The expected rows may end before it or after it."""
        if self._expected and not self.met_expected and self.count == self._expected[0]:
            self.met_expected = self.digest.hexdigest() == self._expected[1]
        self.digest.update(raw + b"\n")

    def _reject(self, error: InvalidRow, raw: bytes, reason: str) -> None:
        key = f"line {error.line}"
        if self.shard is not None and not self.shard.contains(key):
            return
        self.invalid.append((error.line, Rejected(key=key, reason=reason, row=_text(raw))))
        self.invalid_bytes += len(raw)
        if self.invalid_bytes > MAX_LINE_BYTES:
            raise CaiError(
                f"{error.file}:{error.line}: more than {MAX_LINE_BYTES >> 20} MiB of consecutive rejected lines",
                hint="is this the right file?",
                code="invalid-row",
            )


def _text(raw: bytes) -> str:
    """The line as text: UTF-8, or else Latin-1, from which its bytes can be restored."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
