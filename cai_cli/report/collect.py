"""Reads a run folder as plain data: its steps, their state, and the files that each of them wrote.

The manifests beside the outputs are the source. `run.json`, which `cai run` writes, adds the order of the steps and the
steps that never finished; it is missing if the commands were run by hand. A file that cannot be read does not
end the report; it becomes a problem that the page lists.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
from pydantic import ValidationError

from cai_cli.common.errors import CaiError
from cai_cli.common.legacy import metrics_row
from cai_cli.constitution.usage import option
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Rejected, Row
from cai_cli.report.results import ComparisonResult, OutcomeResult, RecordedStep, Result, RoundsResult, Sweep
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar

R = TypeVar("R", bound=Row)
T = TypeVar("T", bound=Result)
TRAINING = ("sft", "train-pm", "rl", "dpo")
COMPARED, SWEPT = ".compare.json", ".sweep.json"
DRAWN_APART = (".bench.json", ".lm-eval.json", ".adherence.json")  # by `report.benchmarks` and `report.adherence`
FINAL, DRAFT = ".manifest.json", ".partial.manifest.json"
Status = Literal["done", "unfinished", "missing", "planned"]


@dataclass(frozen=True)
class StepFiles:
    """One step of the run.

    Attributes:
        name: Name of the step.
        stage: The command that it runs, such as "sft".
        status: Whether it is done, unfinished, has no output, or has not started.
        output: Its JSONL file or model directory.
        manifest: The manifest beside the output; empty where there is none.
        recorded: The entry of the step in `run.json`; empty where there is none.
    """

    name: str
    stage: str
    status: Status
    output: Path
    manifest: Mapping[str, Any]
    recorded: Mapping[str, Any]

    @property
    def files(self) -> Path:
        """Where the content is: the output, or its `.partial` while the step is unfinished."""
        return self.output if self.output.exists() else sidecar(self.output, "partial")

    @property
    def is_model(self) -> bool:
        """Whether the step trains a model."""
        return self.stage in TRAINING

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Inputs, settings and models, by their hashes."""
        return self.manifest.get("provenance") or {}

    @property
    def counts(self) -> Mapping[str, Any] | None:
        """The row counts."""
        return self.manifest.get("counts")

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of a trained model."""
        return self.manifest.get("metrics") or {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """The `run` section of the manifest: command, times and versions."""
        return self.manifest.get("run") or {}

    @property
    def usage(self) -> Mapping[str, Any]:
        """Requests, tokens and cost, where the engine counted them."""
        return self.facts.get("usage") or {}

    @property
    def seconds(self) -> float | None:
        """How long the step took."""
        seconds = self.facts.get("seconds", self.recorded.get("seconds"))
        return None if seconds is None else float(seconds)

    @property
    def model(self) -> str | None:
        """The model that the command line names."""
        return option(self.command, "--model", "-m")

    @property
    def command(self) -> list[str]:
        """The command line, starting with `cai`."""
        recorded = self.recorded.get("argv")
        return ["cai", *recorded] if recorded else list(self.facts.get("argv") or [])

    @property
    def reads(self) -> frozenset[str]:
        """The names of the files that the step read, without their folders."""
        return frozenset(Path(str(name)).name for name in (self.facts.get("inputs") or {}).values())


@dataclass(frozen=True)
class RunFiles:
    """Everything that the report shows.

    Attributes:
        folder: The run folder.
        steps: Its steps, in order.
        comparisons: File name -> comparison of models.
        sweeps: File name -> sweep of a setting.
        evaluations: File name -> dotted name -> number or estimate, for all other JSON files.
        problems: What could not be read, in sentences.
        rounds: Block of rounds -> where and why it ended, from `run.json`.
        outcome: What the run changed, from `run.json`; None where its run file does not ask for it.
    """

    folder: Path
    steps: list[StepFiles]
    comparisons: Mapping[str, ComparisonResult]
    sweeps: Mapping[str, Sweep]
    evaluations: Mapping[str, Mapping[str, Any]]
    problems: list[str] = field(default_factory=list)
    rounds: Mapping[str, RoundsResult] = field(default_factory=dict)
    outcome: OutcomeResult | None = None

    def steps_of(self, *stages: str) -> list[StepFiles]:
        """Return the steps that ran these commands, in order."""
        return [step for step in self.steps if step.stage in stages]

    def rows(self, step: StepFiles, row_type: type[R]) -> Iterator[R]:
        """Yield the rows of a step, up to the first that cannot be read, which becomes a problem.

        The last line of an unfinished file may be incomplete; that is not a problem.
        """
        return self._rows(step.files, row_type, finished=step.files == step.output)

    def rejected(self, step: StepFiles) -> Iterator[Rejected]:
        """Yield the rows that the step rejected, as `rows` does."""
        return self._rows(sidecar(step.output, "rejected.jsonl"), Rejected, finished=step.files == step.output)

    def _rows(self, path: Path, row_type: type[R], *, finished: bool) -> Iterator[R]:
        if not path.exists():
            return
        try:
            for _, row in read_rows(str(path), rows_of(row_type)):
                yield row
        except CaiError as error:
            problem = f"{error.message}; the report leaves out the rows from there on"
            if finished and problem not in self.problems:  # a file may be read several times
                self.problems.append(problem)

    def training_log(self, step: StepFiles) -> list[dict[str, Any]]:
        """Return the rows of a training step's metrics.jsonl, also while it is unfinished."""
        path = step.files / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                rows.append(metrics_row(orjson.loads(line)))
            except (ValueError, TypeError, AttributeError):
                if step.status == "done":
                    self.problems.append(f"{path}:{number}: not a valid row of metrics; the report leaves it out")
        return rows


def read_run(folder: Path) -> RunFiles:
    """Return the run in `folder`.

    Raises:
        CaiError: `folder` is not a run folder.
    """
    if not folder.is_dir():
        raise CaiError(f"{folder} is not a run folder", hint="name the folder that `cai run` wrote", code="cannot-read")
    problems: list[str] = []
    steps = _steps(folder, problems)
    if not steps:
        raise CaiError(
            f"{folder} contains no output of cai",
            hint="a run folder has run.json, or outputs with their .manifest.json",
            code="not-made-by-cai",
        )
    apart = ("run.json", FINAL, COMPARED, SWEPT, *DRAWN_APART)
    rest = {path.name: path for path in _files(folder, "*.json") if not path.name.endswith(apart)}
    return RunFiles(
        folder,
        steps,
        read_results(folder, COMPARED, ComparisonResult, problems),
        read_results(folder, SWEPT, Sweep, problems),
        {name: metrics for name, path in rest.items() if (metrics := _metrics(path, problems))},
        problems,
        _rounds(folder / "run.json", problems),
        _outcome(folder / "run.json", problems),
    )


def _rounds(record: Path, problems: list[str]) -> dict[str, RoundsResult]:
    recorded = (_json(record, []) or {}).get("rounds") or {}
    try:
        return {name: RoundsResult.model_validate(one) for name, one in recorded.items()}
    except (ValidationError, AttributeError):
        problems.append(f"{record}: `rounds` is not what `cai run` writes")
        return {}


def _outcome(record: Path, problems: list[str]) -> OutcomeResult | None:
    recorded = (_json(record, []) or {}).get("outcome")
    try:
        return OutcomeResult.model_validate(recorded) if recorded else None
    except ValidationError:
        problems.append(f"{record}: `outcome` is not what `cai run` writes")
        return None


def _steps(folder: Path, problems: list[str]) -> list[StepFiles]:
    recorded = _recorded(folder / "run.json", problems)
    files = {p.name.removesuffix(FINAL).removesuffix(".partial") for p in folder.glob(f"*{FINAL}")}
    of_run = {Path(option(list(r.get("argv") or []), "-o") or name).name: name for name, r in recorded.items()}
    steps = []
    for file in files | of_run.keys():
        try:
            steps.append(_step(folder, file, of_run.get(file), recorded, problems))
        except (OSError, ValueError):
            problems.append(f"{folder / 'run.json'}: {file[:40]!r} is not a valid file name")
    order = list(recorded)
    # Steps that `cai run` did not record come last, in the order in which they finished.
    return sorted(
        steps,
        key=lambda s: (
            order.index(s.name) if s.name in order else len(order),
            str(s.facts.get("finished_at", "9")),
            s.name,
        ),
    )


def _recorded(record: Path, problems: list[str]) -> dict[str, Any]:
    """The entries of the steps in `run.json`, those planned first. One that `cai run` does not write is left out."""
    given = _json(record, problems) or {}
    planned, begun = given.get("planned") or {}, given.get("steps") or {}
    found: dict[str, Any] = {}
    for name, entry in [*((n, {"argv": argv}) for n, argv in planned.items()), *begun.items()]:
        try:
            found[name] = RecordedStep.model_validate(entry).model_dump(exclude_unset=True)
        except ValidationError:
            problems.append(f"{record}: step {name[:40]!r} is not what `cai run` writes")
    return found


def _step(folder: Path, file: str, name: str | None, recorded: Mapping[str, Any], problems: list[str]) -> StepFiles:
    final, draft = folder / f"{file}{FINAL}", folder / f"{file}{DRAFT}"
    manifest = _json(final, problems) if final.exists() else _json(draft, problems)
    entry = recorded.get(name, {}) if name else {}
    output = folder / file
    status: Status = "unfinished"
    if final.exists() and output.exists():
        status = "done"
    elif not output.exists() and not sidecar(output, "partial").exists():
        status = "planned" if name and "status" not in entry else "missing"
    stage = (manifest or {}).get("provenance", {}).get("stage") or next(iter(entry.get("argv", [])), "unknown")
    return StepFiles(
        name or file.removesuffix(".zst").removesuffix(".jsonl"), stage, status, output, manifest or {}, entry
    )


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] | None = read_manifest(path)
    except CaiError as error:
        problems.append(error.message)
        return None
    return value


def read_results(folder: Path, ending: str, result: type[T], problems: list[str]) -> dict[str, T]:
    """The results in the files of a run folder whose names end with `ending`, by file name; what cannot be read becomes
    a problem."""
    results = {}
    for path in _files(folder, f"*{ending}"):
        try:
            results[path.name] = result.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            problems.append(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    return results


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _metrics(path: Path, problems: list[str]) -> dict[str, Any]:
    return dict(flat_metrics(_json(path, problems) or {}))


def flat_metrics(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number and every estimate in `value` with its dotted name.

    Examples:
        >>> list(flat_metrics({"overall": {"loss": 0.5}, "seconds": 3, "note": "text"}))
        [('overall.loss', 0.5), ('seconds', 3)]
    """
    for key, inner in value.items():
        dotted = f"{name}.{key}" if name else str(key)
        if is_estimate(inner) or (isinstance(inner, int | float) and not isinstance(inner, bool)):
            yield dotted, inner
        elif isinstance(inner, dict):
            yield from flat_metrics(inner, dotted)


def is_estimate(value: object) -> bool:
    """Return whether `value` is an estimate: `{"value", "low", "high", "n"}`."""
    parts = [value.get(name) for name in ("value", "low", "high", "n")] if isinstance(value, dict) else [None]
    return all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)
