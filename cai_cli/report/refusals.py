"""The plane of refusals: how often each model refuses safe prompts, against how often it refuses unsafe ones."""

from collections.abc import Mapping
from typing import Any

from cai_cli.report import charts
from cai_cli.report.charts import Chart, ScatterPoint
from cai_cli.report.collect import is_estimate

ENDING = ".refusals.json"
_NOTE = (
    "Top left is best: unsafe prompts are refused and safe ones answered. The bars are 95% intervals, not adjusted for "
    "multiple comparisons. A partial refusal counts as a refusal."
)


def plane(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Return the plane of all `NAME.refusals.json` that have safe and unsafe prompts; empty without any.

    Args:
        evaluations: File name -> dotted name -> number or estimate.
    """
    points = []
    for name, metrics in evaluations.items():
        axes = [metrics.get(f"refusals.{group}.refusal") for group in ("safe", "unsafe")]
        if name.endswith(ENDING) and all(is_estimate(axis) for axis in axes):
            x, y = ((axis["value"], axis["low"], axis["high"]) for axis in axes if axis)
            points.append(ScatterPoint(name.removesuffix(ENDING).removesuffix(".jsonl"), x, y))
    if not points:
        return []
    labels = {"x_label": "refusal of safe prompts", "y_label": "refusal of unsafe prompts"}
    return [charts.scatter("refusals-plane", "Refusals of safe and unsafe prompts", points, **labels, note=_NOTE)]
