"""`metrics.jsonl`: the metrics of a training run, one row per step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.files import write_atomically
from cai_cli.common.legacy import metrics_row
from cai_cli.data.jsonl import cut_torn_tail
from cai_cli.training import distributed


class Metrics:
    """The rows of `metrics.jsonl`: one object per step, all with the same keys, null where a step has no value.

    Every rank holds the rows; rank 0 writes them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, tuple(names)
        self.rows: list[dict[str, Any]] = distributed.from_rank_zero(self._read)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        cut_torn_tail(self.path)
        return [metrics_row(orjson.loads(line)) for line in self.path.read_bytes().splitlines()]

    def at(self, step: int) -> dict[str, Any] | None:
        """The row of `step`, if there is one."""
        return next((row for row in self.rows if row["step"] == step), None)

    def put(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Append the row of `step`, or add values to it where it is the last one."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1] |= {k: v for k, v in values.items() if v is not None}
            self._write_all()
            return
        row = {"step": step, **dict.fromkeys(self.names), **values}
        self.rows.append(row)
        if distributed.is_rank_zero():
            with self.path.open("ab") as file:
                file.write(orjson.dumps(row) + b"\n")

    def cut_after(self, step: int) -> None:
        """Remove the steps after the checkpoint from which a run resumes, because they are repeated."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._write_all()

    def _write_all(self) -> None:
        if distributed.is_rank_zero():
            write_atomically(self.path, (orjson.dumps(row) + b"\n" for row in self.rows))
