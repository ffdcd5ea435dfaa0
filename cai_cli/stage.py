"""How a data stage runs: units of work in, one outcome each, in input order, resumable at any moment.

A stage gives `units` (what there is to do) and `work` (a window of units -> outcomes). This file does the rest, the
same for every stage: what is finished is not asked again, `in = out + rejected + skipped`, an output that another
run made is refused, and a kill at any moment leaves files that the same command completes.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import orjson
from filelock import FileLock, Timeout

from cai_cli import console
from cai_cli.errors import BadRow, CaiError
from cai_cli.jsonl import AppendFile, KeyTable, shown, sync_directory
from cai_cli.manifest import InputFile, differences, read_manifest, run_facts, write_json
from cai_cli.records import Rejected, Row, dump_row

T = TypeVar("T")
U = TypeVar("U")
Outcome = Row | Rejected


@dataclass(frozen=True)
class Unit(Generic[T]):
    """One thing to do: its key among the outcomes, the input line it came from, and the row(s) it needs.

    `hashed_id`: the key is a hash of the content, so a second unit with it is the same work again and is skipped;
    with an id that was given it is an error.
    """

    key: str
    line: int
    value: T
    hashed_id: bool = False


@dataclass(frozen=True)
class Skip:
    """Something in the input that asks for nothing, and why; counted, and shown in the closing line."""

    reason: str
    line: int


Units = Iterator[Unit[T] | Skip]
Work = Callable[[Sequence[T]], Iterable[Outcome]]


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
    def write(self, outcomes: Sequence[Outcome]) -> None: ...
    def finish(self, counts: Counts, facts: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Job(Generic[T]):
    """One run of one stage, from its files to its summary."""

    provenance: dict[str, Any]
    inputs: Mapping[str, InputFile]
    output: str
    overwrite: bool
    units: Callable[[], Units[T]]
    work: Work[T]
    window: int
    total: int | None = None

    @property
    def stage(self) -> str:
        return str(self.provenance["stage"])

    def run(self, *, as_json: bool) -> dict[str, Any]:
        """Do what is not done yet; returns (and prints) the summary. Raises CaiError."""
        if self.output == "-":
            summary = self._work_through(StdoutSink())
        else:
            path = Path(self.output)
            refuse_input_as_output(path, self.inputs)
            with one_writer(path):
                done = finished_summary(path, self.provenance, self.overwrite)
                summary = done or self._work_through(FileSink(path, self.provenance, self.overwrite))
        print_summary(summary, as_json=as_json, stdout_is_data=self.output == "-")
        return summary

    def _work_through(self, sink: Sink) -> dict[str, Any]:
        watch, counts = console.Stopwatch(), Counts()
        done, seen = sink.finished(), KeyTable()
        matched = 0
        with console.track(self.total, self.stage) as advance:
            units = self._checked(self.units(), seen, counts)
            # Windows are cut by position in the input, so a resumed run asks in the same company as the first.
            while window := list(islice(units, self.window)):
                missing = [u for u in window if u.key not in done]
                matched += len(window) - len(missing)
                outcomes = list(self.work([u.value for u in missing])) if missing else []
                if len(outcomes) != len(missing):
                    raise AssertionError(f"{self.stage}: {len(missing)} units gave {len(outcomes)} outcomes")
                sink.write(outcomes)
                advance(len(window))
        if matched != done.size:
            raise CaiError(
                f"{self.output} holds {done.size - matched} finished rows that this input does not ask for",
                hint="the input changed since; --overwrite starts afresh",
            )
        facts = run_facts(watch.seconds, self.inputs)
        sink.finish(counts, facts)
        if counts.units == 0:
            console.warn(f"{self.stage}: the input holds no rows")
        return {"stage": self.stage, "status": "finished", "output": self.output, **counts.as_json(),
                "seconds": facts["seconds"]}  # fmt: skip

    def _checked(self, units: Units[T], seen: KeyTable, counts: Counts) -> Iterator[Unit[T]]:
        name = shown(next(iter(self.inputs.values())).name)
        for unit in units:
            counts.units += 1
            if isinstance(unit, Skip):
                counts.skipped[unit.reason] += 1
                continue
            first = seen.add(unit.key, unit.line)
            if first is not None and unit.hashed_id:
                counts.skipped["same prompt as an earlier line"] += 1
                continue
            if first is not None:
                raise BadRow(name, unit.line, f"id {unit.key!r} was already used on line {first}", "ids must be unique")
            yield unit


class FileSink:
    """`OUT.partial` and `OUT.rejected.jsonl` growing, then `OUT` with its manifest."""

    def __init__(self, path: Path, provenance: dict[str, Any], overwrite: bool) -> None:
        self.path = path
        self.partial = AppendFile(sidecar(path, "partial"))
        self.rejected = AppendFile(sidecar(path, "rejected.jsonl"))
        self.draft = sidecar(path, "partial.manifest.json")
        self.provenance = provenance
        recorded = None if overwrite else read_manifest(self.draft)
        if recorded:
            refuse_other_run(self.partial.path, recorded["provenance"], provenance)
        else:
            if not overwrite and self.partial.path.exists():
                raise CaiError(
                    f"{self.partial.path} is there, but not the manifest that says what made it",
                    hint="--overwrite starts afresh",
                )
            for stale in (self.partial.path, self.rejected.path, path, sidecar(path, "manifest.json")):
                stale.unlink(missing_ok=True)
            write_json(self.draft, {"status": "running", "provenance": provenance})

    def finished(self) -> KeyTable:
        done = KeyTable()
        for file in (self.partial, self.rejected):
            for key in file.finished_keys():
                done.add(key, 0)
        if done.size:
            console.say(f"going on with {self.partial.path}: {done.size:,} rows are finished")
        return done

    def write(self, outcomes: Sequence[Outcome]) -> None:
        self.rejected.append(o for o in outcomes if isinstance(o, Rejected))
        self.partial.append(o for o in outcomes if not isinstance(o, Rejected))

    def finish(self, counts: Counts, facts: dict[str, Any]) -> None:
        """Count what is on disk, then make the output appear whole: manifest draft, rename, manifest rename."""
        self.partial.append([])
        self.partial.close()
        self.rejected.close()
        self.partial.path.touch()
        with self.partial.path.open("rb") as file:
            counts.out = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        counts.rejected = rejected_reasons(self.rejected.path)
        manifest = {"status": "finished", "provenance": self.provenance, "counts": counts.as_json(), "run": facts}
        write_json(self.draft, manifest)
        os.replace(self.partial.path, self.path)
        os.replace(self.draft, sidecar(self.path, "manifest.json"))
        sync_directory(self.path.parent)


class StdoutSink:
    """Rows to stdout as they come; what is rejected goes to stderr as a whole row, so it is not lost."""

    def __init__(self) -> None:
        self.out = 0
        self.rejected: Counter[str] = Counter()

    def finished(self) -> KeyTable:
        return KeyTable()

    def write(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Rejected):
                self.rejected[outcome.reason] += 1
                console.warn(f"rejected: {dump_row(outcome).decode()}")
            else:
                sys.stdout.buffer.write(dump_row(outcome) + b"\n")
                self.out += 1
        sys.stdout.buffer.flush()

    def finish(self, counts: Counts, facts: dict[str, Any]) -> None:
        counts.out, counts.rejected = self.out, self.rejected


# --- shared with the training stages --------------------------------------------------------------------------------


def sidecar(path: Path, ending: str) -> Path:
    """`OUT.ending`, beside OUT."""
    return path.with_name(f"{path.name}.{ending}")


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Hold `OUT.lock` while writing OUT; a second writer is refused at once, a killed holder frees it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(sidecar(path, "lock"), timeout=0)
        with lock:
            yield
            sidecar(path, "lock").unlink(missing_ok=True)
    except Timeout:
        raise CaiError(f"another cai is writing {path}", hint="wait for it, or choose another output") from None
    except PermissionError as error:
        raise CaiError(f"cannot write beside {path}: {error.strerror}") from error


def refuse_input_as_output(path: Path, inputs: Mapping[str, InputFile]) -> None:
    """Raises CaiError when the output is one of the inputs, by whatever name or link."""
    for file in inputs.values():
        if file.name != "-" and path.exists() and Path(file.name).exists() and path.samefile(file.name):
            raise CaiError(f"{path} is both input and output", hint="choose another -o")


def refuse_other_run(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CaiError naming each difference when `path` was made by another run than the one wanted."""
    if changed := differences(recorded, wanted):
        raise CaiError(
            f"{path} was made by another run: {'; '.join(changed)}",
            hint="--overwrite starts afresh; or choose another -o",
        )


def finished_summary(path: Path, provenance: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of an output that is already whole, or None when there is work to do.

    Raises CaiError when it was made by another run, or by something other than cai.
    """
    if overwrite or not path.exists():
        return None
    draft, final = sidecar(path, "partial.manifest.json"), sidecar(path, "manifest.json")
    waiting = read_manifest(draft)
    if waiting and waiting["status"] == "finished" and not sidecar(path, "partial").exists():
        os.replace(draft, final)  # killed between the two renames
    manifest = read_manifest(final)
    if manifest is None:
        raise CaiError(
            f"{path} is there, but no manifest says that cai made it",
            hint="--overwrite replaces it; or choose another -o",
        )
    refuse_other_run(path, manifest["provenance"], provenance)
    console.say(f"{path} is already finished; nothing to do (--overwrite makes it anew)")
    return {
        "stage": provenance["stage"],
        "status": "already finished",
        "output": str(path),
        **manifest["counts"],
        "seconds": manifest["run"]["seconds"],
    }


def rejected_reasons(path: Path) -> Counter[str]:
    """Reason -> how many, of a rejected file (empty where there is none)."""
    if not path.exists():
        return Counter()
    with path.open("rb") as file:
        return Counter(orjson.loads(line)["reason"] for line in file)


def print_summary(summary: dict[str, Any], *, as_json: bool, stdout_is_data: bool) -> None:
    """The closing line on stderr, or with `--json` the summary as one object (on stdout unless rows went there)."""
    if as_json:
        line = orjson.dumps(summary).decode()
        print(line, file=sys.stderr if stdout_is_data else sys.stdout)
        return
    parts = [f"{summary['in']:,} in = {summary['out']:,} out"]
    for name in ("rejected", "skipped"):
        reasons = ", ".join(f"{count:,} {why}" for why, count in summary.get(f"{name}_reasons", {}).items())
        parts.append(f"{summary[name]:,} {name}" + (f" ({reasons})" if reasons else ""))
    target = "" if stdout_is_data else f" -> {summary['output']}"
    console.say(f"{summary['stage']}: {' + '.join(parts)} in {summary['seconds']:,.1f} s{target}")
