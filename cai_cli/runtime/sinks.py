"""Where the outcomes of a data stage go: a file that grows and then appears whole, or stdout."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.jsonl import AppendFile, RawLine, cut_torn_tail, read_values
from cai_cli.data.schema import Rejected, Row, WorkItemRecord, dump_row, reason_kind
from cai_cli.runtime.manifest import read_manifest, write_json
from cai_cli.runtime.output_files import publish, refuse_other_run, rejected_reasons, set_aside, sidecar

Outcome = Row | Rejected | RawLine


@dataclass
class Counts:
    """Conservation of rows: `units` = out + rejected + skipped."""

    units: int = 0
    out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        return {
            "in": self.units,
            "out": self.out,
            "rejected": self.rejected.total(),
            "skipped": self.skipped.total(),
            "rejected_reasons": dict(sorted(self.rejected.items())),
            "skipped_reasons": dict(sorted(self.skipped.items())),
        }


class Sink(Protocol):
    """Where outcomes go."""

    def finished(self) -> KeyTable: ...
    def out_of_order(self) -> dict[str, Outcome]: ...
    def used(self) -> dict[str, Any] | None: ...
    def stop(self, out_of_order: Sequence[Outcome], used: dict[str, Any] | None) -> None: ...
    def ask(self, units: Sequence[WorkItemRecord]) -> None: ...
    def write(self, outcomes: Sequence[Outcome]) -> None: ...
    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None: ...


class FileSink:
    """`OUT.partial` and `OUT.rejected.jsonl` growing, then `OUT` with its manifest.

    `OUT.units.jsonl` says in which order units were asked, from which line and with which content: of a shard for
    `cai merge`, and of an input that cannot be hashed beforehand, so that a resumed run notices another content.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], overwrite: bool) -> None:
        self.path = path
        self.partial = AppendFile(sidecar(path, "partial"))
        self.rejected = AppendFile(sidecar(path, "rejected.jsonl"))
        self.units = AppendFile(sidecar(path, "units.jsonl"))
        self.ahead = AppendFile(sidecar(path, "partial.ahead.jsonl"))
        self.kept: dict[str, Outcome] = {}
        self.digests = KeyTable()
        self.draft = sidecar(path, "partial.manifest.json")
        self.provenance = provenance
        self.recorded = recorded = None if overwrite else read_manifest(self.draft)
        if recorded:
            refuse_other_run(self.partial.path, recorded["provenance"], provenance)
        elif not overwrite and self.partial.path.exists():
            raise CaiError(
                f"{self.partial.path} is there, but not the manifest that says what made it",
                hint="--overwrite starts afresh",
            )
        else:
            self.start_over()

    def start_over(self) -> None:
        """Remove what earlier runs left unfinished and say what this one makes. A finished output steps aside until
        the new one is whole."""
        set_aside(self.path)
        for file in (self.partial, self.rejected, self.units, self.ahead):
            file.path.unlink(missing_ok=True)
        write_json(self.draft, {"status": "running", "provenance": self.provenance})

    def finished(self) -> KeyTable:
        done = KeyTable()
        for file in (self.partial, self.rejected):
            for key in file.finished_keys():
                done.add(key, 0)
        self.kept = {row.key: row for row in self.ahead.rows() if row.key not in done}
        if done.size or self.kept:
            console.say(f"going on with {self.partial.path}: {done.size + len(self.kept):,} rows are finished")
        if self.units.path.exists():
            cut_torn_tail(self.units.path)
            for _, value in read_values(str(self.units.path)):
                self.digests.add(value["key"], value["digest"])
        return done

    def out_of_order(self) -> dict[str, Outcome]:
        """What an earlier run finished behind a row that it did not: few, as `windows.in_order` bounds them."""
        return self.kept

    def used(self) -> dict[str, Any] | None:
        """The usage that an earlier run of this output recorded when it stopped."""
        return self.recorded.get("usage") if self.recorded else None

    def stop(self, out_of_order: Sequence[Outcome], used: dict[str, Any] | None) -> None:
        """Keep what is finished but cannot be appended yet, because a row before it is not."""
        kept = self.kept | {outcome.key: outcome for outcome in out_of_order}
        self.ahead.path.unlink(missing_ok=True)
        self.ahead.append(kept.values())
        self.ahead.close()
        if used:
            write_json(self.draft, {"status": "running", "provenance": self.provenance, "usage": used})

    def ask(self, units: Sequence[WorkItemRecord]) -> None:
        """Note units before they are answered. Raises CaiError when one was noted before with another content."""
        fresh = []
        for unit in units:
            digest = self.digests.get(unit.key)
            if digest is None:
                fresh.append(unit)
            elif digest != unit.digest:
                raise CaiError(
                    f"line {unit.line}: {unit.key!r} had another content when {self.partial.path} was begun",
                    hint="the input changed since; --overwrite starts afresh",
                )
        self.units.append(fresh)

    def write(self, outcomes: Sequence[Outcome]) -> None:
        self.rejected.append(o for o in outcomes if isinstance(o, Rejected))
        self.partial.append(o for o in outcomes if not isinstance(o, Rejected))

    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None:
        """Count what is on disk, then make the output appear whole. `rows` identifies what was read."""
        for written in (self.partial, self.rejected, self.units):
            written.close()
        self.partial.path.touch()
        self.units.path.touch()  # of an empty shard too; where nothing needs it, it goes when OUT appears
        with self.partial.path.open("rb") as file:
            counts.out = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        counts.rejected = rejected_reasons(self.rejected.path)
        manifest = {"status": "finished", "provenance": self.provenance, "counts": counts.as_json(), "rows": rows}
        write_json(self.draft, {**manifest, "run": facts})
        self.ahead.path.unlink(missing_ok=True)
        publish(self.path)


class StdoutSink:
    """Rows to stdout as they come; what is rejected goes to stderr as a whole row, so it is not lost.

    `observe` is told every outcome in passing, in order: what went to stdout cannot be read again.
    """

    def __init__(self, observe: Callable[[Any], None] | None = None) -> None:
        self.observe = observe
        self.out = 0
        self.rejected: Counter[str] = Counter()

    def finished(self) -> KeyTable:
        return KeyTable()

    def out_of_order(self) -> dict[str, Outcome]:
        return {}

    def used(self) -> dict[str, Any] | None:
        return None

    def stop(self, out_of_order: Sequence[Outcome], used: dict[str, Any] | None) -> None:
        """Nothing goes on from a pipe that broke."""

    def ask(self, units: Sequence[WorkItemRecord]) -> None:
        pass

    def write(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if self.observe:
                self.observe(outcome)
            if isinstance(outcome, Rejected):
                self.rejected[reason_kind(outcome.reason)] += 1
                console.warn(f"rejected: {dump_row(outcome).decode()}")
            else:
                line = outcome.data if isinstance(outcome, RawLine) else dump_row(outcome)
                sys.stdout.buffer.write((console.safe_json(line) if sys.stdout.isatty() else line) + b"\n")
                self.out += 1
        sys.stdout.buffer.flush()

    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None:
        counts.out, counts.rejected = self.out, self.rejected
