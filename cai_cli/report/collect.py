"""A run folder as plain data: which steps there are, in what state, and the files each of them left.

The manifests beside the outputs are what is read; `run.json` (of `cai run`) adds the order and the steps that never
finished, and may be absent: a road run from the shell leaves the same folder without it. What cannot be read becomes a
problem that the page states, not the end of the report.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from cai_cli.common.errors import CaiError
from cai_cli.common.legacy import metrics_row
from cai_cli.constitution.usage import option
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Rejected, Row
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar

R = TypeVar("R", bound=Row)
T = TypeVar("T", bound="Result")
TRAINING = ("sft", "train-pm", "rl")
FINAL, DRAFT = ".manifest.json", ".partial.manifest.json"
Status = Literal["done", "unfinished", "missing"]


@dataclass(frozen=True)
class StepFiles:
    """One step: `output` is its JSONL file or model directory, `manifest` what stands beside it (empty where nothing
    does), `files` where its content is now (the `.partial` while unfinished)."""

    name: str
    stage: str
    status: Status
    output: Path
    manifest: Mapping[str, Any]
    recorded: Mapping[str, Any]

    @property
    def files(self) -> Path:
        return self.output if self.output.exists() else sidecar(self.output, "partial")

    @property
    def is_model(self) -> bool:
        return self.stage in TRAINING

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.manifest.get("provenance") or {}

    @property
    def counts(self) -> Mapping[str, Any] | None:
        return self.manifest.get("counts")

    @property
    def figures(self) -> Mapping[str, Any]:
        return self.manifest.get("metrics") or {}

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.get("run") or {}

    @property
    def usage(self) -> Mapping[str, Any]:
        """Requests, tokens and cost, where its engine counted them."""
        return self.facts.get("usage") or {}

    @property
    def seconds(self) -> float | None:
        seconds = self.facts.get("seconds", self.recorded.get("seconds"))
        return None if seconds is None else float(seconds)

    @property
    def model(self) -> str | None:
        """The model it asked or started from, as the command line named it."""
        return option(self.command, "--model", "-m")

    @property
    def command(self) -> list[str]:
        """The command line, with its first word."""
        recorded = self.recorded.get("argv")
        return ["cai", *recorded] if recorded else list(self.facts.get("argv") or [])

    @property
    def reads(self) -> frozenset[str]:
        """The names of the files it read, without their folders."""
        return frozenset(Path(str(name)).name for name in (self.facts.get("inputs") or {}).values())


class Result(BaseModel):
    """A file of figures that another command left in the run folder."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class ReportedEstimate(Result):
    value: float
    low: float
    high: float
    n: int


class Rating(ReportedEstimate):
    model: str


class Ratings(Result):
    harmless: list[Rating] = []
    helpful: list[Rating] = []


class WinRate(ReportedEstimate):
    """How often `a` wins against `b` over prompts of one kind."""

    a: str
    b: str
    kind: str | None


class ComparisonResult(Result):
    """`NAME.compare.json`: Elo ratings with intervals on the paper's two axes, and who beats whom."""

    models: list[str]
    ratings: Ratings
    win_rates: list[WinRate] = []


class Point(ReportedEstimate):
    at: float


class Sweep(Result):
    """`NAME.sweep.json`: one figure as one setting of the run varies."""

    setting: str
    figure: str
    points: list[Point]


@dataclass(frozen=True)
class RunFiles:
    """Everything the report is drawn from. `evaluations`: file name -> dotted name -> figure or number."""

    folder: Path
    steps: list[StepFiles]
    comparisons: Mapping[str, ComparisonResult]
    sweeps: Mapping[str, Sweep]
    evaluations: Mapping[str, Mapping[str, Any]]
    problems: list[str] = field(default_factory=list)

    def of(self, *stages: str) -> list[StepFiles]:
        return [step for step in self.steps if step.stage in stages]

    def rows(self, step: StepFiles, row_type: type[R]) -> Iterator[R]:
        """The rows of a step up to the first that cannot be read, which becomes a problem. The last line of an
        unfinished file may be torn; that is none."""
        return self._rows(step.files, row_type, finished=step.files == step.output)

    def rejected(self, step: StepFiles) -> Iterator[Rejected]:
        """As `rows`, those that the step rejected."""
        return self._rows(sidecar(step.output, "rejected.jsonl"), Rejected, finished=step.files == step.output)

    def _rows(self, path: Path, row_type: type[R], *, finished: bool) -> Iterator[R]:
        if not path.exists():
            return
        try:
            for _, row in read_rows(str(path), rows_of(row_type)):
                yield row
        except CaiError as error:
            problem = f"{error.message}; the rows from there on are not in this report"
            if finished and problem not in self.problems:  # a file is read more than once
                self.problems.append(problem)

    def metrics(self, step: StepFiles) -> list[dict[str, Any]]:
        """The rows of a training step's metrics.jsonl, finished or not."""
        path = step.files / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                rows.append(metrics_row(orjson.loads(line)))
            except (ValueError, TypeError, AttributeError):
                if step.status == "done":
                    self.problems.append(f"{path}:{number}: not a row of metrics; it is left out")
        return rows


def read_run(folder: Path) -> RunFiles:
    """The run in `folder`. Raises CaiError when it is no run folder."""
    if not folder.is_dir():
        raise CaiError(f"{folder} is no run folder", hint="name the folder that `cai run` made")
    problems: list[str] = []
    steps = _steps(folder, problems)
    if not steps:
        raise CaiError(
            f"{folder} holds nothing that cai made",
            hint="a run folder has run.json, or outputs with their .manifest.json",
        )
    other = {
        path.name: path
        for path in sorted(folder.glob("*.json"))
        if path.name != "run.json" and not path.name.endswith(FINAL)
    }
    compared = {n: p for n, p in other.items() if n.endswith(".compare.json")}
    swept = {n: p for n, p in other.items() if n.endswith(".sweep.json")}
    rest = {n: p for n, p in other.items() if n not in compared and n not in swept}
    return RunFiles(
        folder,
        steps,
        _results(compared, ComparisonResult, problems),
        _results(swept, Sweep, problems),
        {name: figures for name, path in rest.items() if (figures := _figures(path, problems))},
        problems,
    )


def _steps(folder: Path, problems: list[str]) -> list[StepFiles]:
    record = _json(folder / "run.json", problems) or {}
    recorded: dict[str, Any] = record.get("steps") or {}
    found = {p.name.removesuffix(FINAL).removesuffix(".partial") for p in folder.glob(f"*{FINAL}")}
    of_run = {Path(option(list(r.get("argv") or []), "-o") or name).name: name for name, r in recorded.items()}
    steps = []
    for file in found | of_run.keys():
        try:
            steps.append(_step(folder, file, of_run.get(file), recorded, problems))
        except (OSError, ValueError):
            problems.append(f"{folder / 'run.json'}: {file[:40]!r} is the name of no file")
    order = list(recorded)
    # Those that `cai run` did not make stand last, in the order in which they were finished.
    return sorted(
        steps,
        key=lambda s: (
            order.index(s.name) if s.name in order else len(order),
            str(s.facts.get("finished_at", "9")),
            s.name,
        ),
    )


def _step(folder: Path, file: str, name: str | None, recorded: Mapping[str, Any], problems: list[str]) -> StepFiles:
    final, draft = folder / f"{file}{FINAL}", folder / f"{file}{DRAFT}"
    manifest = _json(final, problems) if final.exists() else _json(draft, problems)
    entry = recorded.get(name, {}) if name else {}
    output = folder / file
    status: Status = "unfinished"
    if final.exists() and output.exists():
        status = "done"
    elif not output.exists() and not sidecar(output, "partial").exists():
        status = "missing"
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


def _results(paths: Mapping[str, Path], result: type[T], problems: list[str]) -> dict[str, T]:
    found = {}
    for name, path in paths.items():
        try:
            found[name] = result.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            problems.append(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    return found


def _figures(path: Path, problems: list[str]) -> dict[str, Any]:
    return dict(flat_figures(_json(path, problems) or {}))


def flat_figures(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and every figure with an interval in `value`, by its dotted name."""
    for key, inner in value.items():
        dotted = f"{name}.{key}" if name else str(key)
        if is_figure(inner) or (isinstance(inner, int | float) and not isinstance(inner, bool)):
            yield dotted, inner
        elif isinstance(inner, dict):
            yield from flat_figures(inner, dotted)


def is_figure(value: object) -> bool:
    """Whether it is `{"value", "low", "high", "n"}`."""
    return isinstance(value, dict) and {"value", "low", "high", "n"} <= value.keys()
