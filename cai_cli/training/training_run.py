"""Runs a training stage: OUT is a directory that is published when complete, with its manifest beside it.

The work is done in `OUT.partial/` (checkpoints, metrics.jsonl, and at the end model/). A finished output is not
changed, an output of another run is refused, and after a kill at any time the same command completes the files. With
several processes only rank 0 handles files; all ranks train.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.cards.model_card import model_card
from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.files import write_error
from cai_cli.common.library_errors import cannot_write
from cai_cli.constitution.usage import recorded_principles
from cai_cli.data.jsonl import AppendFile, sync_directory
from cai_cli.data.schema import Row, dump_row
from cai_cli.models.source import ModelSource
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import InputFile, read_manifest, run_facts, write_json
from cai_cli.runtime.output_files import (
    finished_summary,
    is_stream,
    one_writer,
    refuse_input_as_output,
    refuse_to_resume_other_run,
    sidecar,
)
from cai_cli.runtime.summary import counted, print_summary
from cai_cli.training import distributed

Train = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class TrainingJob:
    """One run of one training stage.

    Attributes:
        provenance: What decides the finished model (`manifest.provenance`).
        inputs: The input files by role.
        models: The models that training starts from or uses, by role.
        output: The directory of the finished model.
        overwrite: Whether to start from scratch where the output exists.
        counts: What happened to the input rows.
        train: Trains in the directory it is given, leaves the finished model in `model/` there, and returns the metrics
            for the manifest (on rank 0), with `throughput` among them.
        facts: How the rows are divided among processes and batches (`TrainingConfig.facts`).
        check: Raises CaiError where training cannot start on this machine. Called on every rank, before the output is
            touched.
    """

    provenance: dict[str, Any]
    inputs: Mapping[str, InputFile]
    models: Mapping[str, ModelSource]
    output: Path
    overwrite: bool
    counts: Counts
    train: Train
    facts: Mapping[str, Any]
    check: Callable[[], None] = lambda: None

    @property
    def stage(self) -> str:
        return str(self.provenance["stage"])

    def run(self, *, as_json: bool) -> dict[str, Any]:
        """Complete the output and return the summary, which rank 0 prints.

        Raises:
            CaiError: The output belongs to another run, cannot be written, or no rows are left to train on.
        """
        if not self.output.name or is_stream(str(self.output)):
            raise UsageError(
                "a model is a directory and cannot be written to a stream", hint="-o DIRECTORY", code="invalid-option"
            )
        with ExitStack() as stack:
            summary = distributed.from_rank_zero(lambda: self._begin(stack)) or self._train(self.output)
        if distributed.is_rank_zero():
            print_summary(summary, as_json=as_json)
        return summary

    def _begin(self, stack: ExitStack) -> dict[str, Any] | None:
        """Lock the output; returns the summary of a finished output, or None where there is work to do."""
        path = self.output
        refuse_input_as_output(path, self.inputs)
        for base in self.models.values():
            if path.exists() and path.samefile(base.path):
                raise CaiError(
                    f"{path} is both the model to start from and the output",
                    hint="choose another -o",
                    code="input-is-output",
                )
        stack.enter_context(one_writer(path))
        _complete_publishing(path)
        summary = finished_summary(path, self.provenance, self.overwrite)
        return summary and summary | (read_manifest(sidecar(path, "manifest.json")) or {})["metrics"]

    def _train(self, path: Path) -> dict[str, Any]:
        stopwatch = console.Stopwatch()
        if self.counts.train:
            self.check()
        provenance, work = distributed.from_rank_zero(lambda: self._open_work(path))
        if not self.counts.train:
            raise CaiError(
                f"{self.stage}: no rows to train on ({counted(self.counts.as_json())})",
                hint=f"see {sidecar(path, 'rejected.jsonl')}" if self.counts.rejected else None,
                code="no-rows",
            )
        sources = [*(Path(file.name) for file in self.inputs.values()), *(base.path for base in self.models.values())]
        principles = distributed.from_rank_zero(lambda: recorded_principles(sources))

        def finish() -> dict[str, Any]:
            training = {**self.facts, **metrics.pop("throughput")}
            facts = {**run_facts(stopwatch.seconds, self.inputs), "principles": principles, "training": training}
            return self._finish(path, work, provenance, metrics, facts)

        try:
            with redirect_stdout(sys.stderr):  # trackers print, and stdout holds the summary alone
                metrics = self.train(work)
            return distributed.from_rank_zero(finish)
        except OSError as error:
            if not cannot_write(error, work):
                raise
            raise write_error(work, error, hint="run the same command again to resume") from error

    def _finish(
        self, path: Path, work: Path, provenance: dict[str, Any], metrics: dict[str, Any], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Publish the model in `work` as `path`; returns the summary."""
        counts = self.counts.as_json()
        manifest = {"provenance": provenance, "counts": counts, "metrics": metrics, "run": facts}
        manifest |= self.counts.ends_as_json()
        (work / "model/README.md").write_text(model_card(manifest, self.models), encoding="utf-8")
        shutil.copyfile(work / "metrics.jsonl", work / "model/metrics.jsonl")
        _sync_files(work / "model")
        write_json(sidecar(path, "partial.manifest.json"), {"status": "finished", **manifest})
        _complete_publishing(path)
        return {"stage": self.stage, "status": "finished", "output": str(path), **counts,
                **self.counts.ends_as_json(), "seconds": facts["seconds"], **metrics}  # fmt: skip

    def _open_work(self, path: Path) -> tuple[dict[str, Any], Path]:
        """The provenance to record, and `OUT.partial/`, empty or as an earlier run of this provenance left it."""
        work, draft = sidecar(path, "partial"), sidecar(path, "partial.manifest.json")
        recorded = None if self.overwrite else read_manifest(draft)
        if recorded:
            refuse_to_resume_other_run(work, recorded["provenance"], self.provenance)
        else:
            if not self.overwrite and work.exists():
                raise CaiError(
                    f"{work} exists, but its manifest is missing",
                    hint="--overwrite starts from scratch",
                    code="not-made-by-cai",
                )
            _remove_output(path)
            _remove_tree(work)
            write_json(draft, {"status": "running", "provenance": self.provenance})
        work.mkdir(exist_ok=True)
        _remove_tree(work / "model")  # left by a kill while it was being written
        rejected = AppendFile(sidecar(path, "rejected.jsonl"))
        rejected.path.unlink(missing_ok=True)
        rejected.append(self.counts.rejected_rows)
        rejected.close()
        return (recorded["provenance"] if recorded else self.provenance), work


def _complete_publishing(path: Path) -> None:
    """Publish a finished model: rename it, remove `OUT.partial`, rename its manifest. After a kill between any two of
    these steps the next run completes them."""
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
    """Remove the output of an earlier run. Raises CaiError for a directory that cai did not make."""
    if path.is_dir() and any(path.iterdir()) and not sidecar(path, "manifest.json").exists():
        raise CaiError(
            f"{path} is a directory that was not made by cai",
            hint="remove it yourself, or choose another -o",
            code="not-made-by-cai",
        )
    sidecar(path, "manifest.json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync_files(directory: Path) -> None:
    for path in directory.rglob("*"):  # named chat templates are in a folder of their own
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(directory)


def rows_digest(rows: Iterable[Row]) -> dict[str, Any]:
    """The number and the hash of the rows that a model is trained on; equal for a file and for stdin."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(dump_row(row) + b"\n")
        count += 1
    return {"count": count, "sha256": digest.hexdigest()}
