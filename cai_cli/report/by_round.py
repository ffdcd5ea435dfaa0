"""The steps of rounds: every metric by round, and how the models of several constitutions compare under each judge."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.report.charts import Chart, Series, lines
from cai_cli.report.collect import RunFiles, StepFiles, flat_metrics, is_estimate
from cai_cli.report.curves import NAMES, TITLES
from cai_cli.report.results import ComparisonResult
from cai_cli.runtime.step_names import round_of

NOTE = "The band shows 95% intervals, not adjusted for multiple comparisons."


@dataclass(frozen=True)
class StepByRound:
    """A step in several rounds, with a chart for each of its metrics."""

    name: str
    charts: Sequence[Chart]


def steps_by_round(run: RunFiles, audits: Mapping[str, Mapping[str, Any]]) -> list[StepByRound]:
    """Return every step with metrics in two or more rounds; a metric that is the same in all of them is not drawn.

    Args:
        run: The run.
        audits: The audits of labels, by step.
    """
    by_step: dict[str, dict[int, Mapping[str, Any]]] = {}
    for step in run.steps:
        if at := round_of(step.name):
            by_step.setdefault(at[0], {})[at[1]] = _metrics(step, audits.get(step.name, {}))
    charts = ((name, list(_charts(name, rounds))) for name, rounds in by_step.items())
    return [StepByRound(name, drawn) for name, drawn in charts if drawn]


def _metrics(step: StepFiles, audit: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step by name: those of the model or of the labels, its rows and its seconds."""
    counts = {"rows": step.counts["out"] if "out" in step.counts else step.counts["used"]} if step.counts else {}
    seconds = {} if step.seconds is None else {"seconds": step.seconds}
    return dict(flat_metrics({**step.metrics, **audit})) | counts | seconds


def _charts(step: str, rounds: Mapping[int, Mapping[str, Any]]) -> Iterator[Chart]:
    for name in dict.fromkeys(name for metrics in rounds.values() for name in metrics):
        points = {number: metrics[name] for number, metrics in sorted(rounds.items()) if name in metrics}
        if len(points) < 2 or name.endswith("_before") or name.startswith("throughput"):
            continue
        with_interval = all(is_estimate(value) for value in points.values())
        values = [value["value"] if is_estimate(value) else value for value in points.values()]
        if len(set(values)) == 1:  # such as the number of steps
            continue
        ends = [[value[end] for value in points.values()] for end in ("low", "high")] if with_interval else [[], []]
        series = Series(NAMES.get(name, name.replace("_", " ")), list(points), values, *ends)
        title = TITLES.get(name, name.replace("_", " "))
        yield lines(f"{step}-{name}-by-round", title, [series], x_label="round", note=NOTE if with_interval else "")


# --- constitutions ------------------------------------------------------------------------------------------------

_CONSTITUTION = re.compile(r"@(?:[\w.-]+\.)?constitution=([^@]+)")


@dataclass(frozen=True)
class Matrix:
    """Each model under each constitution's judge.

    Attributes:
        name: The comparison.
        judges: The constitutions of the judges, one for each column.
        rows: A model, and its Elo rating for harmlessness by each judge; None where it has none.
    """

    name: str
    judges: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Any]]]


def matrices(comparisons: Mapping[str, ComparisonResult]) -> list[Matrix]:
    """Return a matrix for every comparison that was made under several constitutions."""
    groups: dict[str, dict[str, ComparisonResult]] = {}
    for file, compared in comparisons.items():
        if found := _CONSTITUTION.search(file.removesuffix(".compare.json").removesuffix(".jsonl")):
            name = file.replace(found[0], "").removesuffix(".compare.json").removesuffix(".jsonl")
            groups.setdefault(name, {})[found[1].removesuffix(".jsonl")] = compared
    found_matrices = []
    for name, judges in groups.items():
        ratings = [{r.model: r.model_dump() for r in compared.ratings.harmless} for compared in judges.values()]
        models = list(dict.fromkeys(model for compared in judges.values() for model in compared.models))
        if len(judges) > 1:
            rows = [(model, [of_judge.get(model) for of_judge in ratings]) for model in models]
            found_matrices.append(Matrix(name, list(judges), rows))
    return found_matrices
