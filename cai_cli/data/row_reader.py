"""How a stage takes its input: which share of the rows, and what becomes of a line that is no row.

By default the first invalid line stops the run with its file and line. With `--skip-invalid` invalid lines are written
to the rejected file and counted like every other rejected row.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.data.jsonl import MAX_LINE_BYTES, Numbered, read_prompts, read_rows
from cai_cli.data.schema import Identified, Kind, Prompt, Rejected, dump_row
from cai_cli.data.sharding import Shard

R = TypeVar("R", bound=Identified)


class RowReader:
    """Reads a stage's input rows; `bad` holds the bad lines met and not yet taken away, by line number.

    `skip_invalid` None: the command has no such option to speak of.
    """

    def __init__(
        self, shard: str | None = None, *, skip_invalid: bool | None = False, max_invalid: int | None = None
    ) -> None:
        if max_invalid is not None and not skip_invalid:
            raise UsageError("--max-invalid bounds what --skip-invalid lets pass", hint="give both")
        self.shard = Shard.parse(shard) if shard else None
        self.skip_invalid, self.max_invalid = skip_invalid, max_invalid
        self.bad: deque[Numbered[Rejected]] = deque()
        self.waiting = 0  # bytes in `bad`
        self._start()

    def _start(self) -> None:
        self.digest, self.count, self.invalid_count = hashlib.sha256(), 0, 0

    def rows(self, source: str, parse: Callable[[object], R], limit: int | None = None) -> Iterator[Numbered[R]]:
        """(line, row) of the first `limit` rows, of those only the shard's. Raises InvalidRow."""
        self._start()
        return self._shared(islice(read_rows(source, parse, self._on_invalid), limit))

    def prompts(self, source: str, kind: Kind | None = None, limit: int | None = None) -> Iterator[Numbered[Prompt]]:
        """The same of prompts in any accepted form."""
        self._start()
        return self._shared(islice(read_prompts(source, kind, self._on_invalid), limit))

    def read(self) -> dict[str, Any]:
        """What identifies the rows and bad lines read so far, of all shards, from a file or from stdin."""
        return {"count": self.count, "sha256": self.digest.hexdigest()}

    def invalid_before(self, line: float = math.inf) -> Iterator[Numbered[Rejected]]:
        """Take away the bad lines that stand before `line`."""
        self.waiting = 0
        while self.bad and self.bad[0][0] < line:
            yield self.bad.popleft()

    def take_invalid(self) -> list[Rejected]:
        """Take away all bad lines: for stages that read their whole input before they start."""
        return [row for _, row in self.invalid_before()]

    def _shared(self, rows: Iterator[Numbered[R]]) -> Iterator[Numbered[R]]:
        for line, row in rows:
            self.count += 1
            self.digest.update(dump_row(row) + b"\n")
            if self.shard is None or self.shard.takes(row.id):
                yield line, row

    def _on_invalid(self, error: InvalidRow, raw: bytes) -> None:
        if not self.skip_invalid:
            hints = [error.hint] if error.hint else []
            if self.skip_invalid is not None:
                hints.append("--skip-invalid goes on and keeps such lines in the rejected file")
            raise InvalidRow(error.file, error.line, error.reason, "; ".join(hints) or None) from None
        self.invalid_count += 1
        self.digest.update(raw + b"\n")
        if self.max_invalid is not None and self.invalid_count > self.max_invalid:
            raise CaiError(
                f"more than {self.max_invalid:,} bad lines; the last one: {error.message}",
                hint="mend the input, or allow more with --max-invalid",
            )
        key = f"line {error.line}"
        if self.shard is not None and not self.shard.takes(key):
            return
        reason = f"bad line: {Path(error.file).name}:{error.line}: {error.reason}"
        self.bad.append((error.line, Rejected(key=key, reason=reason, row=_text(raw))))
        self.waiting += len(raw)
        if self.waiting > MAX_LINE_BYTES:
            raise CaiError(
                f"{error.file}:{error.line}: more than {MAX_LINE_BYTES >> 20} MiB of bad lines in a row",
                hint="is this a JSONL file?",
            )


def _text(raw: bytes) -> str:
    """The line as text. One that is not UTF-8 is read as Latin-1, from which its bytes can be had again."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
