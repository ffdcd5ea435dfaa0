"""The section on published benchmarks: the scores of `cai eval bench` and of `cai eval lm-eval`, before and after."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from cai_cli.metrics.intervals import Z
from cai_cli.report import charts
from cai_cli.report.charts import Chart
from cai_cli.report.collect import RunFiles, read_results
from cai_cli.report.results import ReportedEstimate, Result

MOST_BARS = 40  # in one chart; the table has all


class Scores(Result):
    """The scores of one model."""

    model: str
    score: ReportedEstimate
    sections: dict[str, ReportedEstimate] = Field(default={})
    groups: dict[str, ReportedEstimate] = Field(default={})


class Difference(ReportedEstimate):
    """The mean difference of `model` from `baseline` over the same prompts."""

    model: str
    baseline: str


class BenchResult(Result):
    """`NAME.bench.json`: the scores of models on a benchmark."""

    title: str
    metric: str
    better: str
    judge: str | None
    models: list[Scores]
    differences: list[Difference] = Field(default=[])
    simultaneous: dict[str, int] = Field(default={})


class LmEvalName(Result):
    """The model that `cai eval lm-eval` evaluated."""

    model: str


class LmEvalResult(Result):
    """`NAME.lm-eval.json`: what lm-evaluation-harness writes, and the name of the model."""

    results: dict[str, dict[str, Any]]
    date: float = 0.0
    samples: dict[str, dict[str, int]] = Field(default={}, alias="n-samples")
    cai: LmEvalName


@dataclass(frozen=True)
class Metric:
    """A metric of the harness, its standard error where it has one, and the number of questions; 0 where unknown."""

    value: float
    error: float | None
    n: int = 0


@dataclass(frozen=True)
class Published:
    """One benchmark on the page.

    Attributes:
        title: Its heading.
        lede: What the numbers are.
        findings: The differences, in sentences.
        charts: Its charts.
        columns: The columns of its table.
        rows: The rows of its table.
        id: Unique on the page.
    """

    title: str
    lede: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    id: str
    findings: Sequence[str] = ()
    charts: Sequence[Chart] = field(default=())


def published(run: RunFiles) -> list[Published]:
    """The benchmarks of a run; a file that cannot be read becomes a problem of the run."""
    benches = read_results(run.folder, ".bench.json", BenchResult, run.problems)
    found = [_bench(name, result) for name, result in benches.items() if result.models]
    abilities = list(read_results(run.folder, ".lm-eval.json", LmEvalResult, run.problems).values())
    return found + ([_abilities(sorted(abilities, key=lambda result: result.date))] if abilities else [])


# --- cai eval bench -----------------------------------------------------------------------------------------------


def _bench(name: str, result: BenchResult) -> Published:
    better, judged = f"{result.better} is better", f", judged by {result.judge}" if result.judge else ""
    note = f"95% intervals{charts.adjustment(result.simultaneous.get('models', 1))}; {better}."
    scores = {one.model: one.score.model_dump() for one in result.models}
    plots = [charts.forest(name, f"{result.title}: {result.metric}", scores, x_label=result.metric, note=note)]
    parts = {one.model: one.sections or one.groups for one in result.models}
    names = list(dict.fromkeys(part for of in parts.values() for part in of))
    bars = {
        f"{part}: {model}": parts[model][part].model_dump() for part in names for model in parts if part in parts[model]
    }
    if 1 < len(bars) <= MOST_BARS:
        kind = "section" if result.models[0].sections else "category"
        note = f"95% intervals{charts.adjustment(len(bars))}."
        title = f"{result.title} by {kind}"
        plots.append(charts.forest(f"{name}-parts", title, bars, x_label=result.metric, note=note))
    groups = list(dict.fromkeys(group for one in result.models for group in one.groups))
    rows = [["all", *(one.score.model_dump() for one in result.models)]]
    rows += [[f"section {part}", *_cells(part, [one.sections for one in result.models])]
             for part in (result.models[0].sections or {})]  # fmt: skip
    rows += [[group, *_cells(group, [one.groups for one in result.models])] for group in groups]
    return Published(
        result.title,
        f"{result.metric[0].upper()}{result.metric[1:]}{judged}; {better}.",
        ["category", *(one.model for one in result.models)],
        rows,
        name,
        [_sentence(difference, result) for difference in result.differences],
        plots,
    )


def _cells(name: str, of_models: Sequence[Mapping[str, ReportedEstimate]]) -> list[Any]:
    return [found.model_dump() if (found := of.get(name)) else None for of in of_models]


def _sentence(difference: Difference, result: BenchResult) -> str:
    """A difference in words; a change is stated only where the interval excludes zero."""
    low, high, rose = difference.low, difference.high, difference.low > 0
    change = "better" if rose == (result.better == "higher") else "worse"
    verdict = "no significant difference" if low <= 0 <= high else change
    points = f"{100 * difference.value:+.1f} points (95%: {100 * low:+.1f} to {100 * high:+.1f}, n = {difference.n:,})"
    return f"{difference.model} against {difference.baseline}: {verdict}, {points}."


# --- cai eval lm-eval ---------------------------------------------------------------------------------------------


def _abilities(results: Sequence[LmEvalResult]) -> Published:
    """The metrics of lm-evaluation-harness, one model a column, the earliest first."""
    models = _unique([result.cai.model for result in results])
    by_model = dict(zip(models, (_metrics(result) for result in results), strict=True))
    names = list(dict.fromkeys(name for metrics in by_model.values() for name in metrics))
    first, last = models[0], models[-1]
    rows: list[list[Any]] = []
    bars: dict[str, dict[str, float]] = {}
    for name in names:
        found = {model: metrics[name] for model, metrics in by_model.items() if name in metrics}
        bars |= {f"{name}: {model}": _estimate(metric) for model, metric in found.items() if metric.error is not None}
        change = _change(found[first], found[last]) if len(models) > 1 and {first, last} <= found.keys() else None
        cells = [_with_error(found[model].value, found[model].error) if model in found else None for model in models]
        rows.append([name, *cells, *([change] if len(models) > 1 else [])])
    note = "Value and 1.96 standard errors of the harness, not adjusted for multiple comparisons."
    plots = [charts.forest("lm-eval", "Abilities", bars, x_label="value", note=note)] if bars else []
    columns = ["task and metric", *models, *([f"{last} - {first}"] if len(models) > 1 else [])]
    lede = "Metrics of lm-evaluation-harness with their standard errors. That of a difference treats the models as "
    lede += "independent, so it is too wide where they answer the same questions alike."
    return Published("Abilities kept", lede, columns, rows, "lm-eval", charts=plots if len(bars) <= MOST_BARS else [])


def _metrics(result: LmEvalResult) -> dict[str, Metric]:
    """The metrics by task and name, of the harness's `{"acc,none": ..., "acc_stderr,none": ...}`."""
    found: dict[str, Metric] = {}
    for task, values in result.results.items():
        n = result.samples.get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            found[name] = Metric(value, error if _is_number(error) else None, n)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _estimate(metric: Metric) -> dict[str, float]:
    half = Z * (metric.error or 0.0)
    return {"value": metric.value, "low": metric.value - half, "high": metric.value + half, "n": metric.n}


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _change(before: Metric, after: Metric) -> str:
    errors = [metric.error for metric in (before, after) if metric.error is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    return f"{'+' if after.value >= before.value else ''}{_with_error(after.value - before.value, error)}"


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one occurs twice."""
    return [name if names.index(name) == place else f"{name} ({place + 1})" for place, name in enumerate(names)]
