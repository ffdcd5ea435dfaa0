"""The files of a training stage: OUT is a directory that appears whole, with its manifest beside it.

Work happens in `OUT.partial/` (checkpoints, metrics.jsonl, and at the end model/). What is finished is left alone, an
output of another run is refused, and a kill at any moment leaves what the same command completes. Of several processes
rank 0 does all of this, and the others train.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cai_cli.cards.model_card import model_card
from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.constitution.usage import recorded_principles
from cai_cli.data.jsonl import AppendFile, sync_directory
from cai_cli.data.schema import Rejected, Row, dump_row, reason_kind
from cai_cli.models.source import ModelSource
from cai_cli.runtime.manifest import InputFile, read_manifest, run_facts, write_json
from cai_cli.runtime.output_files import finished_summary, one_writer, refuse_input_as_output, refuse_other_run, sidecar
from cai_cli.training import distributed


@dataclass
class Counts:
    """Conservation of examples: in = used + rejected + skipped, used = train + held_out."""

    train: int = 0
    held_out: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        used = self.train + self.held_out
        reasons = Counter(reason_kind(row.reason) for row in self.rejected)
        return {
            "in": used + len(self.rejected) + self.skipped.total(),
            "used": used,
            "train": self.train,
            "held_out": self.held_out,
            "rejected": len(self.rejected),
            "skipped": self.skipped.total(),
            "rejected_reasons": dict(sorted(reasons.items())),
            "skipped_reasons": dict(sorted(self.skipped.items())),
        }


Train = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class TrainingJob:
    """One run of one training stage. `train(work)` leaves the finished model in `work/model` and returns figures, on
    rank 0; `facts` say how the rows are dealt out (`TrainingConfig.facts`)."""

    provenance: dict[str, Any]
    inputs: Mapping[str, InputFile]
    models: Mapping[str, ModelSource]
    output: Path
    overwrite: bool
    counts: Counts
    train: Train
    facts: Mapping[str, Any]

    @property
    def stage(self) -> str:
        return str(self.provenance["stage"])

    def run(self, *, as_json: bool) -> dict[str, Any]:
        """Train what is not trained yet; returns (and rank 0 prints) the summary. Raises CaiError."""
        if self.output.name in ("", "-"):
            raise UsageError("a model is a directory, which cannot go to stdout", hint="-o DIRECTORY")
        with ExitStack() as held:
            summary = distributed.from_leader(lambda: self._begin(held)) or self._train(self.output)
        if distributed.leads():
            print_summary(summary, as_json=as_json)
        return summary

    def _begin(self, held: ExitStack) -> dict[str, Any] | None:
        """Take the output's lock; the summary of a finished output, or None where there is work to do."""
        path = self.output
        refuse_input_as_output(path, self.inputs)
        for base in self.models.values():
            if path.exists() and path.samefile(base.path):
                raise CaiError(f"{path} is both the model to start from and the output", hint="choose another -o")
        held.enter_context(one_writer(path))
        _complete_publishing(path)
        summary = finished_summary(path, self.provenance, self.overwrite)
        return summary and summary | (read_manifest(sidecar(path, "manifest.json")) or {})["figures"]

    def _train(self, path: Path) -> dict[str, Any]:
        monitor_score_of = console.Stopwatch()
        work = distributed.from_leader(lambda: self._open_work(path))
        if not self.counts.train:
            raise CaiError(
                f"{self.stage}: no rows to train on ({_counted(self.counts.as_json())})",
                hint=f"see {sidecar(path, 'rejected.jsonl')}" if self.counts.rejected else None,
            )
        sources = [*(Path(file.name) for file in self.inputs.values()), *(base.path for base in self.models.values())]
        principles = distributed.from_leader(lambda: recorded_principles(sources))
        try:
            figures = self.train(work)
            return distributed.from_leader(lambda: self._finish(path, work, figures, monitor_score_of, principles))
        except OSError as error:
            raise CaiError(f"cannot write {work}: {error.strerror}", hint="run again to go on") from error

    def _finish(
        self, path: Path, work: Path, figures: dict[str, Any], monitor_score_of: console.Stopwatch, principles: Any
    ) -> dict[str, Any]:
        """Make the model in `work` appear as `path`; the summary."""
        dealt = {**self.facts, **figures.pop("throughput")}
        facts = {**run_facts(monitor_score_of.seconds, self.inputs), "principles": principles, "training": dealt}
        counts = self.counts.as_json()
        manifest = {"provenance": self.provenance, "counts": counts, "figures": figures, "run": facts}
        (work / "model/README.md").write_text(model_card(manifest, self.models), encoding="utf-8")
        shutil.copyfile(work / "metrics.jsonl", work / "model/metrics.jsonl")
        _sync_files(work / "model")
        write_json(sidecar(path, "partial.manifest.json"), {"status": "finished", **manifest})
        _complete_publishing(path)
        return {"stage": self.stage, "status": "finished", "output": str(path), **counts,
                "seconds": facts["seconds"], **figures}  # fmt: skip

    def _open_work(self, path: Path) -> Path:
        """`OUT.partial/`, empty or as an earlier run of the same provenance left it."""
        work, draft = sidecar(path, "partial"), sidecar(path, "partial.manifest.json")
        recorded = None if self.overwrite else read_manifest(draft)
        if recorded:
            refuse_other_run(work, recorded["provenance"], self.provenance)
        else:
            if not self.overwrite and work.exists():
                raise CaiError(
                    f"{work} is there, but not the manifest that says what made it", hint="--overwrite starts afresh"
                )
            _remove_output(path)
            _remove_tree(work)
            write_json(draft, {"status": "running", "provenance": self.provenance})
        work.mkdir(exist_ok=True)
        _remove_tree(work / "model")  # of a kill while it was being written
        rejected = AppendFile(sidecar(path, "rejected.jsonl"))
        rejected.path.unlink(missing_ok=True)
        rejected.append(self.counts.rejected)
        rejected.close()
        return work


def _complete_publishing(path: Path) -> None:
    """Make a finished model appear: rename it, remove the work, rename its manifest. Killed between any two of
    these, the next run does the rest."""
    work, draft = sidecar(path, "partial"), sidecar(path, "partial.manifest.json")
    manifest = read_manifest(draft)
    if manifest is None or manifest["status"] != "finished":
        return
    if (work / "model").exists():
        os.replace(work / "model", path)
    _remove_tree(work)
    os.replace(draft, sidecar(path, "manifest.json"))
    sync_directory(path.parent)


def _remove_output(path: Path) -> None:
    """Remove what an earlier run made. A directory that cai did not make is never removed. Raises CaiError."""
    if path.is_dir() and any(path.iterdir()) and not sidecar(path, "manifest.json").exists():
        raise CaiError(f"{path} is a directory that cai did not make", hint="remove it yourself, or choose another -o")
    sidecar(path, "manifest.json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync_files(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    sync_directory(directory)


def rows_digest(rows: Iterable[Row]) -> dict[str, Any]:
    """What identifies the rows a model was trained on, read from a file or from stdin."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(dump_row(row) + b"\n")
        count += 1
    return {"count": count, "sha256": digest.hexdigest()}


def print_summary(summary: dict[str, Any], *, as_json: bool) -> None:
    """The closing line on stderr, or with `--json` the summary as one object on stdout."""
    if as_json:
        print(orjson.dumps(summary).decode())
        return
    moved = []
    for name in ("loss", "accuracy", "reward", "held_out_loss"):
        if summary.get(name) is not None:
            before = summary.get(f"{name}_before")
            start = "" if before is None else f"{_point(before)} -> "
            moved.append(f"{name.replace('_', '-')} {start}{_point(summary[name])}")
    figures = f"; {', '.join(moved)}" if moved else ""
    kept = summary.get("kept_step", summary["steps"])
    if kept != summary["steps"]:
        figures += f"; kept is step {kept:,}" + ("" if kept else ", the start model")
    console.say(
        f"{summary['stage']}: {_counted(summary)}{figures}; {summary['steps']:,} steps "
        f"in {summary['seconds']:,.1f} s -> {summary['output']}"
    )


def _point(value: Any) -> str:
    return f"{value['value'] if isinstance(value, dict) else value:.4g}"


def _counted(counts: Mapping[str, Any]) -> str:
    held_out = f" ({counts['train']:,} trained on + {counts['held_out']:,} held out)" if counts["held_out"] else ""
    parts = [f"{counts['in']:,} in = {counts['used']:,} used{held_out}"]
    for name in ("rejected", "skipped"):
        reasons = ", ".join(f"{count:,} {why}" for why, count in counts[f"{name}_reasons"].items())
        parts.append(f"{counts[name]:,} {name}" + (f" ({reasons})" if reasons else ""))
    return " + ".join(parts)
