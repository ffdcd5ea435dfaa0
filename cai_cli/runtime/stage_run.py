"""How a data stage runs: units of work in, one outcome each, in input order, resumable at any moment.

A stage gives `units` (what there is to do) and `work` (a window of units -> outcomes). This file does the rest, the
same for every stage: what is finished is not asked again, `in = out + rejected + skipped`, an output that another
run made is refused, and a kill at any moment leaves files that the same command completes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from cai_cli.common import console
from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.jsonl import display_name
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Rejected, WorkItemRecord
from cai_cli.engines.base import Engine
from cai_cli.runtime.manifest import InputFile, read_manifest, run_facts
from cai_cli.runtime.ordered_map import in_order
from cai_cli.runtime.output_files import (
    finished_summary,
    one_writer,
    publish,
    refuse_input_as_output,
    refuse_other_run,
    sidecar,
)
from cai_cli.runtime.sinks import Counts, FileSink, Outcome, Sink, StdoutSink
from cai_cli.runtime.summary import print_summary

T = TypeVar("T")


@dataclass(frozen=True)
class WorkItem(Generic[T]):
    """One thing to do: its key among the outcomes, the input line it came from, and the row(s) it needs.

    `hashed_id`: the key is a hash of the content, so a second unit with it is the same work again and is skipped;
    with an id that was given it is an error.
    """

    key: str
    line: int
    value: T
    hashed_id: bool = False


@dataclass(frozen=True)
class Skipped:
    """Something in the input that asks for nothing, and why; counted, and shown in the closing line."""

    reason: str
    line: int


@dataclass(frozen=True)
class BatchResult:
    """A window done: how many units it held, how many of them earlier runs had finished, and the outcomes to write."""

    units: int
    before: int
    outcomes: list[Outcome]


WorkItems = Iterator[WorkItem[T] | Skipped]
Work = Callable[[Sequence[T]], Iterable[Outcome]]


@dataclass(frozen=True)
class StageRun(Generic[T]):
    """One run of one stage, from its files to its summary. `units` come in the order of their lines
    (those of one prompt in any order): the shards of a run are merged by line."""

    provenance: dict[str, Any]
    inputs: Mapping[str, InputFile]
    output: str
    overwrite: bool
    units: Callable[[], WorkItems[T]]
    work: Work[T]
    window: int
    total: int | None = None
    reader: RowReader = field(default_factory=RowReader)
    engine: Engine | None = None
    one_by_one: bool = False  # a window is cut only when the one before is written: what is asked depends on that

    @property
    def stage(self) -> str:
        return str(self.provenance["stage"])

    def run(self, *, as_json: bool) -> dict[str, Any]:
        """Do what is not done yet; returns (and prints) the summary. Raises CaiError."""
        summary = self.complete()
        print_summary(summary, as_json=as_json, stdout_is_data=self.output == "-")
        return summary

    def complete(self, sink: Sink | None = None) -> dict[str, Any]:
        """As `run`, for a stage that has more to say in its summary; `sink` takes the outcomes in place of a file."""
        if sink or self.output == "-":
            return self._work_through(sink or StdoutSink())
        return self._fill(Path(self.output))

    def _fill(self, path: Path) -> dict[str, Any]:
        if path.suffix == ".gz":
            raise UsageError(f"{path}: outputs are compressed as .zst only")
        if path.is_dir():
            raise UsageError(f"{path} is a directory, and rows go to a file", hint="-o FILE")
        refuse_input_as_output(path, self.inputs)
        with one_writer(path):
            publish(path)
            done = finished_summary(path, self.provenance, self.overwrite)
            if done is None:
                return self._work_through(FileSink(path, self.provenance, self.overwrite))
            self._refuse_other_stream(path)
            return done

    def _refuse_other_stream(self, path: Path) -> None:
        """A finished output is what a pipe asks for only if the same rows come out of the pipe: read them to know."""
        if not any(file.is_pipe for file in self.inputs.values()):
            return
        for _ in self._checked(self.units(), KeyTable(), Counts()):
            pass
        recorded = (read_manifest(sidecar(path, "manifest.json")) or {})["rows"]
        refuse_other_run(path, {"rows": recorded}, {"rows": self.reader.read()})

    def _work_through(self, sink: Sink) -> dict[str, Any]:
        monitor_score_of, counts = console.Stopwatch(), Counts()
        finished = sink.finished(), sink.out_of_order()
        unmatched, parts = finished[0].size + len(finished[1]), self.reader.shard.count if self.reader.shard else 1
        usage, out_of_order = self.engine.usage if self.engine else None, list[BatchResult]()
        if usage and (recorded := sink.used()):
            usage.resume(recorded)
        groups = in_order(
            self._windows(sink, counts),
            lambda window: self._worked(window, *finished),
            self.engine.workers if self.engine and not self.one_by_one else 1,
            out_of_order,
            self.engine.close if self.engine else lambda: None,
        )
        try:
            with console.track(self.total and self.total / parts, self.stage) as advance, closing(groups):
                for group in groups:
                    sink.write([outcome for worked in group for outcome in worked.outcomes])
                    unmatched -= sum(worked.before for worked in group)
                    advance(sum(worked.units for worked in group))
        except BaseException:
            sink.stop([o for worked in out_of_order for o in worked.outcomes], usage.as_json() if usage else None)
            raise
        finally:
            if self.engine:
                self.engine.close()
        if unmatched:
            raise CaiError(
                f"{self.output} holds {unmatched} finished rows that this input does not ask for",
                hint="the input changed since; --overwrite starts afresh",
            )
        used = {"usage": usage.as_json()} if usage else {}
        facts = run_facts(monitor_score_of.seconds, self.inputs) | used
        sink.finish(counts, self.reader.read(), facts)
        if counts.units == self.reader.count == 0:  # a shard of a few rows may be empty
            console.warn(f"{self.stage}: the input holds no rows")
        elif counts.units and not counts.out:
            console.warn(f"{self.stage}: of {counts.units:,} rows nothing came out; the closing line says why")
        return {"stage": self.stage, "status": "finished", "output": self.output, **counts.as_json(),
                "seconds": facts["seconds"], **used}  # fmt: skip

    def _windows(self, sink: Sink, counts: Counts) -> Iterator[list[WorkItem[T | Rejected]]]:
        """Cut by position in the input, so that a resumed run asks in the same company as the first."""
        noted = self.reader.shard is not None or any(file.sha256 is None for file in self.inputs.values())
        units = self._checked(self.units(), KeyTable(), counts)
        while window := list(islice(units, self.window)):
            if noted:
                sink.ask([WorkItemRecord(key=u.key, line=u.line, digest=_digest(u.value)) for u in window])
            yield window

    def _worked(
        self, window: Sequence[WorkItem[T | Rejected]], done: KeyTable, out_of_order: Mapping[str, Outcome]
    ) -> BatchResult:
        missing = [u for u in window if u.key not in done and u.key not in out_of_order]
        fresh = iter(self._outcomes(missing))
        outcomes = [out_of_order[u.key] if u.key in out_of_order else next(fresh) for u in window if u.key not in done]
        return BatchResult(len(window), len(window) - len(missing), outcomes)

    def _outcomes(self, units: Sequence[WorkItem[T | Rejected]]) -> list[Outcome]:
        """One per unit, in order; a bad line is its own."""
        asked = [u.value for u in units if not isinstance(u.value, Rejected)]
        answers = list(self.work(asked)) if asked else []
        if len(answers) != len(asked):
            raise AssertionError(f"{self.stage}: {len(asked)} units gave {len(answers)} outcomes")
        rest = iter(answers)
        return [u.value if isinstance(u.value, Rejected) else next(rest) for u in units]

    def _checked(self, units: WorkItems[T], seen: KeyTable, counts: Counts) -> Iterator[WorkItem[T | Rejected]]:
        """What is to be done, each once, and between them the bad lines; what is skipped is counted."""
        for unit in units:
            yield from self._invalid_before(unit.line, counts)
            counts.units += 1
            if isinstance(unit, Skipped):
                counts.skipped[unit.reason] += 1
            elif (first := seen.add(unit.key, unit.line)) is None:
                yield unit  # type: ignore[misc]
            elif unit.hashed_id:
                counts.skipped["the same as an earlier line"] += 1
            else:
                name = display_name(next(iter(self.inputs.values())).name)
                raise InvalidRow(
                    name, unit.line, f"id {unit.key!r} was already used on line {first}", "ids must be unique"
                )
        yield from self._invalid_before(math.inf, counts)

    def _invalid_before(self, line: float, counts: Counts) -> Iterator[WorkItem[T | Rejected]]:
        for number, row in self.reader.invalid_before(line):
            counts.units += 1
            yield WorkItem(row.key, number, row)


def _digest(value: object) -> int:
    """32 bits of what a unit asks, to notice when the same key comes with something else."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=4).digest(), "little")
