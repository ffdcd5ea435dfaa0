"""Training curves: every column of numbers in a metrics.jsonl, those a reader wants first in front."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.report.charts import Bin, Chart, Series, lines, reliability
from cai_cli.report.collect import StepFiles

# What a column means and its unit; one that is not here is shown under its own name.
TITLES = {
    "reward": "Preference model's score",
    "pm_score": "Preference model's score on held-out prompts",
    "monitor_score": "Score of the monitor model, which training never uses",
    "kl": "KL from the start model (nats)",
    "reply_tokens": "Length of replies (tokens)",
    "cut_off_share": "Share of replies cut off",
    "evasive_share": "Share of evasive replies",
    "boilerplate_share": "Share of replies with boilerplate",
    "distinct_openings": "Distinct openings",
    "accuracy": "Accuracy",
    "held_out_accuracy": "Accuracy on held-out pairs",
    "loss": "Loss",
    "held_out_loss": "Loss on held-out rows",
    "margin": "Margin of chosen over rejected",
    "mean_score": "Mean score",
    "token_accuracy": "Tokens predicted right",
    "entropy": "Entropy (nats a token)",
    "reward_std": "Spread of the scores in a step",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "epoch": "Epoch",
}
# Drawn as the second line in the picture of another column, which has the same unit.
HELD_OUT = ("loss", "accuracy", "kl", "entropy", "reply_tokens", "cut_off_share")
TOGETHER = {f"held_out_{name}": name for name in HELD_OUT} | {"shaped_reward": "reward"}
NAMES = {
    **dict.fromkeys(HELD_OUT, "in training"),
    **{f"held_out_{name}": "held out" for name in HELD_OUT},
    "reward": "score",
    "shaped_reward": "score less penalties",
}
OPTIMISER = ("learning_rate", "grad_norm", "epoch")


def curves(step: StepFiles, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """(what was learned, how the optimiser went): one picture a column."""
    series = {name: points for name in _columns(rows) if (points := list(_points(rows, name)))}
    flagged = [float(at) for at, _ in flags(rows)]
    order = [*(name for name in TITLES if name in series), *(name for name in series if name not in TITLES)]
    drawn = []
    for name in order:
        if TOGETHER.get(name) in series:
            continue
        group = [name, *(other for other, main in TOGETHER.items() if main == name and other in series)]
        names = NAMES if len(group) > 1 else {}
        found = [Series(names.get(n, n), [x for x, _ in series[n]], [y for _, y in series[n]]) for n in group]
        share = name.endswith(("_share", "accuracy"))
        drawn.append((name, lines(f"{step.name}-{name}", TITLES.get(name, name), found, flags=flagged, share=share)))
    learned = [chart for name, chart in drawn if name not in OPTIMISER]
    return learned, [chart for name, chart in drawn if name in OPTIMISER]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(key for row in rows for key in row) if name != "step"]


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(row.get("step"), int):
            yield row["step"], value


def flags(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(step, what) wherever a monitor raised a flag: a column that is true, or whose name says Goodhart and which
    holds something."""
    found = []
    for row in rows:
        for name, value in row.items():
            if value is True or ("goodhart" in name and value):
                what = name if isinstance(value, bool | int | float) else f"{name}: {value}"
                found.append((int(row["step"]), what))
    return found


def calibration(step: StepFiles) -> Chart | None:
    """The reliability curve that a preference model's manifest carries (`metrics.calibration_curve`), if it does."""
    curve = step.figures.get("calibration_curve")
    if not curve:
        return None
    return reliability(
        f"{step.name}-calibration",
        "Does the label agree as often as the model predicts?",
        [Bin(b["confidence"], b["label"], b["n"]) for b in curve],
        x_label="predicted probability, held-out comparisons",
        note="On the dashed line a probability means what it says.",
    )
