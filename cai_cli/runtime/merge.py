"""`cai merge`: merges the outputs of all shards of a run into the output of the same run without `--shard`.

Each shard writes `OUT.units.jsonl`, which records its work items and their input lines in order. All items of one line
are in one shard, so the rows of the shards merged by line are in the order of the whole run.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge as merge_sorted
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import open_input, read_rows, rows_of
from cai_cli.data.row_types import row_key
from cai_cli.data.schema import WorkItemRecord
from cai_cli.data.sharding import Shard
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.file_transform import rewrite
from cai_cli.runtime.manifest import InputFile, read_manifest, unfinished_differences
from cai_cli.runtime.output_files import refuse_input_as_output, sidecar
from cai_cli.runtime.sinks import Sink

ROWS_PER_WRITE = 1000
RECREATE_HINT = "create this shard again with --overwrite"
ShardRow = tuple[int, bool, bytes]  # input line, whether rejected, the row's bytes


@dataclass(frozen=True)
class Part:
    """A finished shard: its file, its number, and its manifest."""

    path: Path
    shard: Shard
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Part":
        """Read the manifest of `path`. Raises CaiError when it is not a finished output of a run with --shard."""
        manifest = read_manifest(sidecar(path, "manifest.json"))
        if not path.exists() or manifest is None:
            if sidecar(path, "partial").exists():
                raise CaiError(
                    f"{path} is not finished", hint="run its command again to complete it", code="unfinished-output"
                )
            if not path.exists():
                raise CaiError(f"{path} does not exist", code="cannot-read")
            raise CaiError(f"{path} has no manifest, so it was not made by cai", code="not-made-by-cai")
        text = manifest["provenance"]["settings"].get("shard")
        if text is None:
            raise CaiError(f"{path} is not a shard: its run had no --shard", code="invalid-shards")
        return cls(path, Shard.parse(text), manifest)

    @property
    def run(self) -> dict[str, Any]:
        """What must be equal in all shards of one run: the provenance without --shard, and the rows that were read."""
        provenance = self.manifest["provenance"]
        whole = {**provenance, "settings": {**provenance["settings"], "shard": None}}
        return {**whole, "rows": self.manifest["rows"], "shards": self.shard.count}

    def outcomes(self) -> Iterator[ShardRow]:
        """Yield (input line, whether rejected, the row's bytes) in order.

        Raises:
            CaiError: `input-changed`, when the rows in the files are not those that the run recorded.
        """
        kept, rejected = _Rows(self.path), _Rows(sidecar(self.path, "rejected.jsonl"))
        records = sidecar(self.path, "units.jsonl")
        for _, item in read_rows(str(records), rows_of(WorkItemRecord)):
            for is_rejected, rows in ((False, kept), (True, rejected)):
                if rows.key == item.key:
                    yield item.line, is_rejected, rows.take()
                    break
            else:
                raise CaiError(
                    f"{self.path}: row {item.key!r} of {records.name} is missing: a file has been changed",
                    hint=RECREATE_HINT,
                    code="input-changed",
                )
        for rows in (kept, rejected):
            if rows.key is not None:
                raise CaiError(
                    f"{rows.path}: row {rows.key!r} is not in {records.name}: a file has been changed",
                    hint=RECREATE_HINT,
                    code="input-changed",
                )


class _Rows:
    """The rows of a file, one after the other. `key` is the key of the next row, None after the last."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, _lines_of(path)
        self.row = b""
        self.take()

    def take(self) -> bytes:
        """Return the next row and advance."""
        row, self.row = self.row, next(self.lines, b"")
        try:
            self.key = row_key(orjson.loads(self.row)) if self.row else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise CaiError(
                f"{self.path}: a line that is not a row: {self.row[:40]!r}",
                hint=f"the file has been changed; {RECREATE_HINT}",
                code="input-changed",
            ) from None
        return row


def _lines_of(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open_input(str(path)) as file:
            yield from file


def check(parts: Sequence[Part]) -> None:
    """Raises CaiError `invalid-shards` or `other-run`, unless `parts` are all the shards of one run, each once."""
    runs = [orjson.dumps(part.run, option=orjson.OPT_SORT_KEYS) for part in parts]
    common = orjson.loads(Counter(runs).most_common(1)[0][0])
    for part in parts:
        if changed := unfinished_differences(common, part.run):
            raise CaiError(
                f"{part.path} is from another run than the other shards: {'; '.join(changed)}", code="other-run"
            )
    first: dict[int, Path] = {}
    for part in parts:
        if part.shard.index in first:
            name = f"{part.shard.index}/{part.shard.count}"
            raise CaiError(f"{first[part.shard.index]} and {part.path} are both shard {name}", code="invalid-shards")
        first[part.shard.index] = part.path
    count = parts[0].shard.count
    if missing := [f"{i}/{count}" for i in range(1, count + 1) if i not in first]:
        raise CaiError(f"{len(missing)} of {count} shards are missing: {', '.join(missing)}", code="invalid-shards")


def merge(parts: Sequence[Part], sink: Sink, counts: Counts) -> None:
    """Write the rows of all shards to `sink` in the order of the whole run, and add up their counts."""
    outcomes = merge_sorted(*(part.outcomes() for part in parts), key=lambda outcome: outcome[0])
    while group := list(islice(outcomes, ROWS_PER_WRITE)):
        sink.write_lines((row for _, is_rejected, row in group if is_rejected), rejected=True)
        sink.write_lines(row for _, is_rejected, row in group if not is_rejected)
    for part in parts:
        counts.items += part.manifest["counts"]["in"]
        counts.skipped.update(part.manifest["counts"]["skipped_reasons"])


def merge_shards(shards: Sequence[Path], output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Write the output of the whole run that `shards` are the parts of, and print the summary.

    Raises:
        CaiError: A shard is missing, unfinished, or of another run.
    """
    refuse_input_as_output(output, {str(path): InputFile(str(path), None, None) for path in shards})
    parts = [Part.open(path) for path in shards]
    check(parts)
    whole = parts[0].run
    rows = whole.pop("rows")
    del whole["shards"]
    names = parts[0].manifest["run"]["inputs"]
    rewrite(
        output,
        whole,
        {role: InputFile(name, whole["input"][role], None) for role, name in names.items()},
        lambda sink, counts: merge(parts, sink, counts),
        rows=rows,
        overwrite=overwrite,
        as_json=as_json,
    )
