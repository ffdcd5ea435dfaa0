"""Where a data stage writes its outcomes: a file, which is published when complete, or a stream."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically, write_error
from cai_cli.common.hash_index import KeyTable
from cai_cli.common.legacy import has_repr_digests, repr_digest
from cai_cli.data.jsonl import AppendFile, RawLine, cut_torn_tail, open_input, read_values
from cai_cli.data.reply_ends import ReplyEnds
from cai_cli.data.schema import Rejected, Row, WorkItemRecord, dump_row, reason_kind
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.growth import Growth, with_larger_limit
from cai_cli.runtime.manifest import read_manifest, unfinished_differences, write_json
from cai_cli.runtime.output_files import (
    is_stdout,
    is_stream,
    publish,
    refuse_to_resume_other_run,
    rejected_reasons,
    set_aside,
    sidecar,
)
from cai_cli.runtime.work_items import WorkItem, item_digest

Outcome = Row | Rejected | RawLine


class Sink(Protocol):
    """Receives the outcomes of a stage.

    `finished` is called first, then `record_items` and `write` alternately, then either `finish` or `stop`.
    """

    def finished(self) -> KeyTable:
        """The keys of the rows that earlier runs wrote."""
        ...

    def out_of_order(self) -> dict[str, Outcome]:
        """Outcomes of earlier runs that follow a row without an outcome, by key."""
        ...

    def recorded_usage(self) -> dict[str, Any] | None:
        """The usage of the engine that earlier runs recorded when they stopped."""
        ...

    def record_items(self, items: Sequence[WorkItem[Any]]) -> None:
        """Record a batch of items before it is processed. Raises CaiError when the content of one has changed."""
        ...

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Append outcomes in the order of their items."""
        ...

    def write_lines(self, lines: Iterable[bytes], *, rejected: bool = False) -> None:
        """Append rows that are JSON lines already, with their newlines."""
        ...

    def stop(self, out_of_order: Sequence[Outcome], usage: dict[str, Any] | None) -> None:
        """Save the outcomes that cannot be appended because a row before them is missing. Called when the run fails."""
        ...

    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None:
        """Complete `counts` and the output. `rows` identifies the rows read, `facts` are those of `run_facts`."""
        ...


def stream_sink(output: str, observe: Callable[[Any], None] | None = None) -> "StreamSink | None":
    """The sink of an output that is a stream, None where it is a file. `observe` as in `StreamSink`."""
    return StreamSink(output, observe) if is_stream(output) else None


def _open(output: str) -> BinaryIO:
    """Open a device or a named pipe for writing. Raises CaiError."""
    try:
        return open(output, "ab")
    except OSError as error:
        raise write_error(output, error, hint="choose another -o") from error


class FileSink:
    """Writes `OUT.partial` and `OUT.rejected.jsonl`, then `OUT` with its manifest.

    `OUT.units.jsonl` records the input order of the items, their lines and the digests of their content. `cai merge`
    reads it for each shard. A resumed run reads it to detect changes of an input that cannot be hashed beforehand.
    """

    def __init__(
        self,
        path: Path,
        provenance: dict[str, Any],
        overwrite: bool,
        growth: Growth | None = None,
        *,
        grows: bool = False,
    ) -> None:
        """Open the output.

        Args:
            path: OUT.
            provenance: What decides the content of this run. A run that resumes keeps the recorded one, which may be
                of an earlier version.
            overwrite: Whether to start from scratch where an unfinished output exists.
            growth: The finished output that this run extends; None where there is none.
            grows: Whether a run with a larger limit resumes an unfinished output.

        Raises:
            CaiError: `other-run` or `not-made-by-cai`, when the unfinished output cannot be resumed.
        """
        self.path = path
        self.partial = AppendFile(sidecar(path, "partial"))
        self.rejected = AppendFile(sidecar(path, "rejected.jsonl"))
        self.items = AppendFile(sidecar(path, "units.jsonl"))
        self.ahead = AppendFile(sidecar(path, "partial.ahead.jsonl"))
        self.draft = sidecar(path, "partial.manifest.json")
        self.kept: dict[str, Outcome] = {}
        self.digests = KeyTable()
        self.provenance = provenance
        self.recorded = None if overwrite else read_manifest(self.draft)
        if self.recorded and self._can_start_over(provenance):
            self.recorded = None
        if self.recorded:
            self._resume(provenance, grows=grows)
        elif growth and not overwrite:
            self._grow(growth)
        elif not overwrite and self.partial.path.exists():
            raise CaiError(
                f"{self.partial.path} exists, but its manifest is missing",
                hint="--overwrite starts from scratch",
                code="not-made-by-cai",
            )
        else:
            self.start_over()
        self.digest = repr_digest if has_repr_digests(self.provenance["cai"]) else item_digest

    def _can_start_over(self, provenance: dict[str, Any]) -> bool:
        """Whether the draft is of another run that wrote nothing."""
        written = (self.partial, self.rejected, self.ahead)
        empty = not any(file.path.exists() and file.path.stat().st_size for file in written)
        recorded = self.recorded or {}
        return empty and "grown" not in recorded and bool(unfinished_differences(recorded["provenance"], provenance))

    def _resume(self, provenance: dict[str, Any], *, grows: bool) -> None:
        """Go on with the unfinished output, which keeps its provenance; with `grows`, its limit may have grown."""
        recorded = self.recorded or {}
        kept = recorded["provenance"]
        self.provenance = (grows and with_larger_limit(kept, provenance)) or kept
        refuse_to_resume_other_run(self.partial.path, self.provenance, provenance)
        if self.provenance != kept:
            write_json(self.draft, {**recorded, "provenance": self.provenance})
        if "grown" in recorded and not self.partial.path.exists():
            self._copy()

    def _grow(self, growth: Growth) -> None:
        """Start from a copy of the finished output, which stays in place until the larger one is complete."""
        self.recorded, self.provenance = growth.draft(), growth.provenance
        write_json(self.draft, self.recorded)
        self._copy()

    def _copy(self) -> None:
        with open_input(str(self.path)) as finished:
            write_atomically(self.partial.path, iter(lambda: finished.read(1 << 20), b""))

    def abandon(self) -> None:
        """Leave the finished output as it was, because the rows that it was made from have changed."""
        for path in (self.partial.path, self.draft):
            path.unlink(missing_ok=True)

    def start_over(self) -> None:
        """Remove the unfinished output of earlier runs and write the manifest of this run. A finished output is renamed
        and kept until the new one is complete."""
        set_aside(self.path)
        for file in (self.partial, self.rejected, self.items, self.ahead):
            file.path.unlink(missing_ok=True)
        write_json(self.draft, {"status": "running", "provenance": self.provenance})

    def finished(self) -> KeyTable:
        done = KeyTable()
        for file in (self.partial, self.rejected):
            for key in file.finished_keys():
                done.add(key, 0)
        self.kept = {row.key: row for row in self.ahead.rows() if row.key not in done}
        if finished := done.size + len(self.kept):
            what = f"{self.path} grows" if "grown" in (self.recorded or {}) else f"resuming {self.partial.path}"
            console.say(f"{what}: {finished:,} rows are finished")
        if self.items.path.exists():
            cut_torn_tail(self.items.path)
            for _, value in read_values(str(self.items.path)):
                self.digests.add(value["key"], value["digest"])
        return done

    def out_of_order(self) -> dict[str, Outcome]:
        return self.kept  # few: `in_order` bounds them

    def recorded_usage(self) -> dict[str, Any] | None:
        return self.recorded.get("usage") if self.recorded else None

    def stop(self, out_of_order: Sequence[Outcome], usage: dict[str, Any] | None) -> None:
        kept = self.kept | {outcome.key: outcome for outcome in out_of_order}
        self.ahead.path.unlink(missing_ok=True)
        self.ahead.append(kept.values())
        self.ahead.close()
        if usage:
            draft = {"status": "running", "provenance": self.provenance, "usage": usage}
            grown = (self.recorded or {}).get("grown")
            write_json(self.draft, draft | ({"grown": grown} if grown else {}))

    def record_items(self, items: Sequence[WorkItem[Any]]) -> None:
        new = []
        for item in items:
            recorded, digest = self.digests.get(item.key), self.digest(item.value)
            if recorded is None:
                new.append(WorkItemRecord(key=item.key, line=item.line, digest=digest))
            elif recorded != digest:
                raise CaiError(
                    f"line {item.line}: {item.key!r} has changed since {self.partial.path} was started",
                    hint="the input has changed; --overwrite starts from scratch",
                    code="input-changed",
                )
        self.items.append(new)

    def write(self, outcomes: Sequence[Outcome]) -> None:
        self.rejected.append(o for o in outcomes if isinstance(o, Rejected))
        self.partial.append(o for o in outcomes if not isinstance(o, Rejected))

    def write_lines(self, lines: Iterable[bytes], *, rejected: bool = False) -> None:
        (self.rejected if rejected else self.partial).append_lines(lines)

    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None:
        """Count the rows on disk, then publish the output."""
        for written in (self.partial, self.rejected, self.items):
            written.close()
        self.partial.path.touch()
        self.items.path.touch()  # an empty shard needs it too; `publish` removes it unless OUT is a shard
        with self.partial.path.open("rb") as file:
            for line in file:
                counts.out += 1
                _count_ends(line, counts.reply_ends)
        counts.rejected = rejected_reasons(self.rejected.path)
        manifest = {"status": "finished", "provenance": self.provenance, "counts": counts.as_json(), "rows": rows}
        manifest |= counts.ends_as_json()
        if grown := (self.recorded or {}).get("grown"):
            manifest["grown"] = grown
        write_json(self.draft, {**manifest, "run": facts})
        self.ahead.path.unlink(missing_ok=True)
        publish(self.path)


def _count_ends(line: bytes, ends: ReplyEnds) -> None:
    if b"finish_reason" in line:  # few rows without a reply are parsed
        ends.add_row(orjson.loads(line))


class StreamSink:
    """Writes rows to stdout, a device or a named pipe as they come, and whole rejected rows to stderr.

    There are no sidecars, and nothing can be resumed.
    """

    def __init__(self, output: str = "-", observe: Callable[[Any], None] | None = None) -> None:
        """Open the stream.

        Args:
            output: A name for which `is_stream` is true.
            observe: Called with every outcome in order, because rows written to a stream cannot be read again.

        Raises:
            CaiError: `cannot-write`.
        """
        self.output, self.observe = output, observe
        self.out = 0
        self.rejected: Counter[str] = Counter()
        self.reply_ends = ReplyEnds()
        self.opened: BinaryIO | None = None
        if not is_stdout(output):
            self.opened = _open(output)

    def finished(self) -> KeyTable:
        return KeyTable()

    def out_of_order(self) -> dict[str, Outcome]:
        return {}

    def recorded_usage(self) -> dict[str, Any] | None:
        return None

    def stop(self, out_of_order: Sequence[Outcome], usage: dict[str, Any] | None) -> None:
        """Nothing is kept: a stream cannot be resumed."""
        if self.opened:
            with suppress(OSError):
                self.opened.close()

    def record_items(self, items: Sequence[WorkItem[Any]]) -> None:
        """Nothing is recorded: a stream cannot be resumed."""

    def write(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if self.observe:
                self.observe(outcome)
            line = outcome.data if isinstance(outcome, RawLine) else dump_row(outcome)
            self._write_line(line, rejected=isinstance(outcome, Rejected))
        self._flush()

    def write_lines(self, lines: Iterable[bytes], *, rejected: bool = False) -> None:
        for line in lines:
            self._write_line(line.rstrip(b"\n"), rejected=rejected)
        self._flush()

    def _write_line(self, line: bytes, *, rejected: bool) -> None:
        if rejected:
            self.rejected[reason_kind(orjson.loads(line)["reason"])] += 1
            console.warn(f"rejected: {line.decode()}")
            return
        file = self.opened or sys.stdout.buffer
        with self._as_cai_error():
            file.write((console.safe_json(line) if file.isatty() else line) + b"\n")
        self.out += 1
        _count_ends(line, self.reply_ends)

    def _flush(self) -> None:
        with self._as_cai_error():
            (self.opened or sys.stdout.buffer).flush()

    @contextmanager
    def _as_cai_error(self) -> Iterator[None]:
        """Turn an error of the opened stream into a CaiError. A reader that has gone away, and stdout, are left to the
        command line."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.opened is None:
                raise
            raise write_error(self.output, error, hint="choose another -o") from error

    def finish(self, counts: Counts, rows: dict[str, Any], facts: dict[str, Any]) -> None:
        counts.reply_ends = self.reply_ends
        if self.opened:
            with self._as_cai_error():
                self.opened.close()
        counts.out, counts.rejected = self.out, self.rejected
