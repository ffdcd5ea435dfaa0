"""`cai merge`: the outputs of all shards of one run -> the output that the run would have had in one piece.

Each shard leaves `OUT.units.jsonl` beside its output: which units it was asked, from which line of the input, in
order. All units of one line are in one shard, so the shards' rows merged by line are in the order of the whole run.
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
from cai_cli.data.formats import row_key
from cai_cli.data.jsonl import open_input, read_rows, rows_of
from cai_cli.data.schema import WorkItemRecord
from cai_cli.data.sharding import Shard
from cai_cli.runtime.file_transform import rewrite
from cai_cli.runtime.manifest import InputFile, differences, read_manifest
from cai_cli.runtime.output_files import refuse_input_as_output, sidecar
from cai_cli.runtime.sinks import Counts, FileSink

ROWS_A_WRITE = 1000
Outcome = tuple[int, bool, bytes]


@dataclass(frozen=True)
class Part:
    """A finished shard: its file, which one it is, and its manifest."""

    path: Path
    shard: Shard
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Part":
        """Raises CaiError when `path` is no finished output of a run with --shard."""
        manifest = read_manifest(sidecar(path, "manifest.json"))
        if not path.exists() or manifest is None:
            unfinished = sidecar(path, "partial").exists()
            raise CaiError(
                f"{path} is not {'finished' if unfinished else 'there, or no manifest says that cai made it'}",
                hint="run its command again to complete it" if unfinished else None,
            )
        text = manifest["provenance"]["settings"].get("shard")
        if text is None:
            raise CaiError(f"{path} is no shard: its run had no --shard")
        return cls(path, Shard.parse(text), manifest)

    @property
    def run(self) -> dict[str, Any]:
        """What must be equal in all shards of one run: the provenance of the whole, and the rows that were read."""
        provenance = self.manifest["provenance"]
        whole = {**provenance, "settings": {**provenance["settings"], "shard": None}}
        return {**whole, "rows": self.manifest["rows"], "shards": self.shard.count}

    def outcomes(self) -> Iterator[Outcome]:
        """(line of the input, whether rejected, the row's bytes) in order. Raises CaiError when the files do not hold
        what the run was asked."""
        kept, rejected = _Rows(self.path), _Rows(sidecar(self.path, "rejected.jsonl"))
        units = sidecar(self.path, "units.jsonl")
        for _, unit in read_rows(str(units), rows_of(WorkItemRecord)):
            for is_rejected, rows in ((False, kept), (True, rejected)):
                if rows.key == unit.key:
                    yield unit.line, is_rejected, rows.take()
                    break
            else:
                raise CaiError(f"{self.path}: no row {unit.key!r}, which {units.name} names: a file was changed since")
        for rows in (kept, rejected):
            if rows.key is not None:
                raise CaiError(f"{rows.path}: row {rows.key!r} is not in {units.name}: a file was changed since")


class _Rows:
    """The rows of a file one after the other; `key` is that of the next, None after the last."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, _lines_of(path)
        self.row = b""
        self.take()

    def take(self) -> bytes:
        """The row at hand; the next one comes to hand."""
        row, self.row = self.row, next(self.lines, b"")
        try:
            self.key = row_key(orjson.loads(self.row)) if self.row else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise CaiError(
                f"{self.path}: a line that no run wrote: {self.row[:40]!r}",
                hint="the file was changed since; make it anew",
            ) from None
        return row


def _lines_of(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open_input(str(path)) as file:
            yield from file


def check(parts: Sequence[Part]) -> None:
    """Raises CaiError naming what keeps `parts` from being all the shards of one run, each once."""
    runs = [orjson.dumps(part.run, option=orjson.OPT_SORT_KEYS) for part in parts]
    common = orjson.loads(Counter(runs).most_common(1)[0][0])
    for part in parts:
        if changed := differences(common, part.run):
            raise CaiError(f"{part.path} is of another run than the other shards: {'; '.join(changed)}")
    first: dict[int, Path] = {}
    for part in parts:
        if part.shard.index in first:
            name = f"{part.shard.index}/{part.shard.count}"
            raise CaiError(f"{first[part.shard.index]} and {part.path} are both shard {name}")
        first[part.shard.index] = part.path
    count = parts[0].shard.count
    if missing := [f"{i}/{count}" for i in range(1, count + 1) if i not in first]:
        raise CaiError(f"of {count} shards {len(missing)} are missing: {', '.join(missing)}")


def merge(parts: Sequence[Part], sink: FileSink, counts: Counts) -> None:
    """Write the rows of all parts to `sink` in the order of the whole run, and add up what they counted."""
    outcomes = merge_sorted(*(part.outcomes() for part in parts), key=lambda outcome: outcome[0])
    while group := list(islice(outcomes, ROWS_A_WRITE)):
        sink.rejected.append_lines(row for _, rejected, row in group if rejected)
        sink.partial.append_lines(row for _, rejected, row in group if not rejected)
    for part in parts:
        counts.units += part.manifest["counts"]["in"]
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
