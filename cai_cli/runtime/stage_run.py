"""Runs a data stage: work items in, one outcome for each, in input order, resumable at any time.

A stage provides `items` (the work items) and `work` (a batch of items -> their outcomes). This module does the
rest for every stage: finished items are not processed again, `in = out + rejected + skipped`, an output of
another run is refused, and after a kill at any time the same command completes the files.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from cai_cli.common import console
from cai_cli.common.errors import CaiError, InvalidRow, UsageError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.jsonl import display_name
from cai_cli.data.row_reader import ChangedRows, RowReader
from cai_cli.data.schema import Rejected
from cai_cli.engines.base import EngineResources, UnansweredRequests
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.growth import expected_rows, growth_of
from cai_cli.runtime.manifest import InputFile, read_manifest, run_facts
from cai_cli.runtime.ordered_map import in_order
from cai_cli.runtime.output_files import (
    finished_summary,
    is_stdout,
    one_writer,
    publish,
    refuse_input_as_output,
    refuse_other_run,
    sidecar,
)
from cai_cli.runtime.sinks import FileSink, Outcome, Sink, stream_sink
from cai_cli.runtime.summary import print_summary, refuse_all_rejected
from cai_cli.runtime.work_items import Skipped, WorkItem, WorkItems

__all__ = ["Skipped", "StageRun", "WorkItem", "WorkItems", "expected_items"]
T = TypeVar("T")
Work = Callable[[Sequence[T]], Iterable[Outcome]]


def expected_items(file: InputFile, limit: int | None, per_row: int = 1) -> int | None:
    """The total of a stage's progress bar: how many work items the first `limit` rows of `file` give.

    Args:
        file: The input.
        limit: The `--limit` option.
        per_row: How many items one row gives.

    Returns:
        The number of items of all shards together (`StageRun` divides it), or None where the number of rows is not
        known before reading, as with stdin and compressed files.
    """
    if file.lines is None:
        return None
    return per_row * (file.lines if limit is None else min(file.lines, limit))


@dataclass(frozen=True)
class _Batch:
    """The outcomes to write of one batch of `size` items, of which `finished` were finished by earlier runs."""

    size: int
    finished: int
    outcomes: list[Outcome]


@dataclass(frozen=True)
class _Resumed:
    """Finished work of earlier runs: the keys of the written rows, and the outcomes that follow a missing row."""

    written: KeyTable
    out_of_order: Mapping[str, Outcome]

    def __contains__(self, key: str) -> bool:
        return key in self.written or key in self.out_of_order

    @property
    def count(self) -> int:
        return self.written.size + len(self.out_of_order)


@dataclass(frozen=True)
class StageRun(Generic[T]):
    """One run of one stage, from its files to its summary.

    Attributes:
        provenance: What decides the content of the output (`manifest.provenance`).
        inputs: The input files by role.
        output: A file, or a stream (`output_files.is_stream`).
        overwrite: Whether to start from scratch where the output exists.
        items: Creates the iterator of work items. They come in the order of their lines, those of one prompt in any
            order, because the shards of a run are merged by line.
        work: Maps the values of a batch to one outcome each, in order.
        batch_size: How many items `work` receives at once.
        total: The number of items for the progress bar (`expected_items`), None where unknown.
        reader: Reads the input; it holds the invalid lines and the shard.
        engine: The model or models that `work` calls, with the usage and the number of concurrent batches.
        grows: Whether a finished output can be extended (`growth`): each row of the input gives its items alone or
            with rows before it, in the order of the output.
        one_by_one: Whether a batch starts only after the previous one is written, because its items depend on that.
    """

    provenance: dict[str, Any]
    inputs: Mapping[str, InputFile]
    output: str
    overwrite: bool
    items: Callable[[], WorkItems[T]]
    work: Work[T]
    batch_size: int
    total: int | None = None
    reader: RowReader = field(default_factory=RowReader)
    engine: EngineResources | None = None
    grows: bool = False
    one_by_one: bool = False

    @property
    def stage(self) -> str:
        return str(self.provenance["stage"])

    def run(self, *, as_json: bool) -> dict[str, Any]:
        """Complete the output, print the summary and return it.

        Raises:
            CaiError: As `complete`, and `all-rejected` when rows were rejected and none was kept.
        """
        summary = self.complete()
        print_summary(summary, as_json=as_json, stdout_is_data=is_stdout(self.output))
        refuse_all_rejected(summary)
        return summary

    def complete(self, sink: Sink | None = None) -> dict[str, Any]:
        """Complete the output and return the summary, for a stage that adds to it before printing.

        Args:
            sink: Receives the outcomes instead of `output`.

        Raises:
            CaiError: The output belongs to another run, cannot be written, or the work failed.
        """
        if sink := sink or stream_sink(self.output):
            return self._run_items(sink)
        path = Path(self.output)
        if path.suffix == ".gz":
            raise UsageError(f"{path}: outputs are compressed as .zst only", code="invalid-option")
        if path.is_dir():
            raise UsageError(f"{path} is a directory, and rows go to a file", hint="-o FILE", code="invalid-option")
        refuse_input_as_output(path, self.inputs)
        with one_writer(path):
            publish(path)
            growth = None
            if self.grows and not self.overwrite:
                growth = growth_of(path, self.provenance, next(iter(self.inputs)))
            done = None if growth else finished_summary(path, self.provenance, self.overwrite)
            if done is None:
                return self._extend(FileSink(path, self.provenance, self.overwrite, growth, grows=self.grows))
            self._refuse_other_stream(path)
            return done

    def _extend(self, sink: FileSink) -> dict[str, Any]:
        """Complete an output that may grow. Raises CaiError `other-run` when the rows that it was made from changed; a
        finished output stays then as it was."""
        if rows := expected_rows(sink.recorded):
            self.reader.expect(rows)
        try:
            return self._run_items(sink)
        except ChangedRows:
            sink.abandon()
            raise

    def _refuse_other_stream(self, path: Path) -> None:
        """Read an input that is a pipe to its end: a finished output is valid only for the same rows."""
        if not any(file.is_pipe for file in self.inputs.values()):
            return
        for _ in self._checked(self.items(), KeyTable(), Counts()):
            pass
        recorded = (read_manifest(sidecar(path, "manifest.json")) or {})["rows"]
        refuse_other_run(path, {"rows": recorded}, {"rows": self.reader.digest_so_far()})

    @property
    def _unanswered(self) -> int:
        return self.engine.unanswered if self.engine else 0

    # --- the three parts of a run -----------------------------------------------------------------------------------

    def _run_items(self, sink: Sink) -> dict[str, Any]:
        """Process the items that are not finished, write their outcomes to `sink` and return the summary."""
        stopwatch, counts = console.Stopwatch(), Counts()
        resumed = _Resumed(sink.finished(), sink.out_of_order())
        if self.engine and self.engine.usage and (recorded := sink.recorded_usage()):
            self.engine.usage.resume(recorded)
        matched = self._process(sink, counts, resumed)
        if unmatched := resumed.count - matched:
            raise CaiError(
                f"{self.output} holds {unmatched} finished rows that are not in this input",
                hint="the input has changed; --overwrite starts from scratch",
                code="input-changed",
            )
        return self._finish(sink, counts, stopwatch)

    def _process(self, sink: Sink, counts: Counts, resumed: _Resumed) -> int:
        """Process all batches; returns how many items earlier runs had finished. On an error `sink` keeps the outcomes
        that were finished out of order, and the usage.

        Raises:
            UnansweredRequests: An engine that reads the results of a batch lacks answers. The outcomes before the first
                such batch of items are written; the others are processed all the same, for their requests.
        """
        shards = self.reader.shard.count if self.reader.shard else 1
        out_of_order, matched = list[_Batch](), 0
        groups = in_order(
            self._batches(sink, counts, resumed),
            lambda batch: self._process_batch(batch, resumed),
            self.engine.workers if self.engine and not self.one_by_one else 1,
            out_of_order,
            self.engine.close if self.engine else lambda: None,
        )
        try:
            with console.track(self.total and self.total / shards, self.stage) as advance, closing(groups):
                for group in groups:
                    if not self._unanswered:
                        sink.write([outcome for batch in group for outcome in batch.outcomes])
                    elif self.one_by_one:
                        break
                    matched += sum(batch.finished for batch in group)
                    advance(sum(batch.size for batch in group))
            if self._unanswered:
                raise UnansweredRequests(self._unanswered)
        except BaseException:
            usage = self.engine.usage if self.engine else None
            outcomes = [outcome for batch in out_of_order for outcome in batch.outcomes]
            sink.stop(outcomes, usage.as_json() if usage else None)
            raise
        finally:
            if self.engine:
                self.engine.close()
        return matched

    def _finish(self, sink: Sink, counts: Counts, stopwatch: console.Stopwatch) -> dict[str, Any]:
        """Publish the output. Warn if there were no input rows, or if all of them were skipped."""
        usage = self.engine.usage if self.engine else None
        used = {"usage": usage.as_json()} if usage else {}
        facts = run_facts(stopwatch.seconds, self.inputs) | used
        counts.dropped = self.reader.dropped
        sink.finish(counts, self.reader.digest_so_far(), facts)
        if counts.items == self.reader.count == 0:  # a shard of a few rows may be empty
            console.warn(f"{self.stage}: the input holds no rows")
        elif counts.items and counts.skipped.total() == counts.items:
            console.warn(f"{self.stage}: all {counts.items:,} rows were skipped; the summary counts the reasons")
        return {"stage": self.stage, "status": "finished", "output": self.output, **counts.as_json(),
                **counts.ends_as_json(), "seconds": facts["seconds"], **used}  # fmt: skip

    # --- batches ----------------------------------------------------------------------------------------------------

    def _batches(self, sink: Sink, counts: Counts, resumed: _Resumed) -> Iterator[list[WorkItem[T | Rejected]]]:
        """Cut the items by position in the input, so that the batches of a resumed run are those of the first."""
        recorded = self.reader.shard is not None or any(file.sha256 is None for file in self.inputs.values())
        items = self._checked(self.items(), KeyTable(), counts)
        while batch := list(islice(items, self.batch_size)):
            if not self.reader.met_expected and any(item.key not in resumed for item in batch):
                raise self.reader.changed_rows()
            if recorded:
                sink.record_items(batch)
            yield batch

    def _process_batch(self, batch: Sequence[WorkItem[T | Rejected]], resumed: _Resumed) -> _Batch:
        missing = [i for i in batch if i.key not in resumed]
        new = iter(self._outcomes(missing))
        outcomes = [
            resumed.out_of_order[i.key] if i.key in resumed.out_of_order else next(new)
            for i in batch
            if i.key not in resumed.written
        ]
        return _Batch(len(batch), len(batch) - len(missing), outcomes)

    def _outcomes(self, items: Sequence[WorkItem[T | Rejected]]) -> list[Outcome]:
        """One outcome per item, in order; an invalid line is its own outcome."""
        values = [i.value for i in items if not isinstance(i.value, Rejected)]
        results = list(self.work(values)) if values else []
        if len(results) != len(values):
            raise AssertionError(f"{self.stage}: {len(values)} items gave {len(results)} outcomes")
        rest = iter(results)
        return [i.value if isinstance(i.value, Rejected) else next(rest) for i in items]

    def _checked(self, items: WorkItems[T], seen: KeyTable, counts: Counts) -> Iterator[WorkItem[T | Rejected]]:
        """Yield each item once, and the invalid lines between them; counts what is skipped."""
        for item in items:
            yield from self._invalid_before(item.line, counts)
            counts.items += 1
            if isinstance(item, Skipped):
                counts.skipped[item.reason] += 1
            elif (first := seen.add(item.key, item.line)) is None:
                yield item  # type: ignore[misc]
            elif item.hashed_id:
                counts.skipped["the same as an earlier line"] += 1
            else:
                raise InvalidRow(
                    display_name(next(iter(self.inputs.values())).name),
                    item.line,
                    f"id {item.key!r} was already used on line {first}",
                    "ids must be unique",
                    code="duplicate-id",
                )
        yield from self._invalid_before(math.inf, counts)

    def _invalid_before(self, line: float, counts: Counts) -> Iterator[WorkItem[T | Rejected]]:
        for number, row in self.reader.invalid_before(line):
            counts.items += 1
            yield WorkItem(row.key, number, row)
