"""Training curves: a chart for every numeric column of a metrics.jsonl, the most important ones first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.report.charts import Bin, Chart, Series, lines, reliability
from cai_cli.report.collect import StepFiles

# Meaning and unit of the columns, in the order of the page; other columns follow under their own names.
TITLES = {
    "reward": "Reward (standard deviations of the start model's scores within a prompt)",
    "pm_reward": "Reward of the preference model (in the same unit)",
    "judge_reward": "Reward of the judge (in the same unit)",
    "pm_score": "Preference model score on held-out prompts (in the same unit)",
    "judge_score": "Score of the judge on held-out prompts (in the same unit)",
    "judge_spread": "Standard deviation of the judge's scores within a prompt (nats)",
    "judge_failed_share": "Share of requests to the judge that failed",
    "no_reward_share": "Share of replies without a reward",
    "judge_alike_share": "Share of questions to which the judge said the same in both phrasings or orders",
    "monitor_score": "Score of the monitor model, which is not used for training",
    "implicit_reward": "Implicit reward of the replies to held-out prompts",
    "kl": "KL divergence from the start model (nats per token)",
    "reply_tokens": "Reply length (tokens)",
    "cut_off_share": "Share of replies cut off at the length limit",
    "evasive_share": "Share of evasive replies",
    "boilerplate_share": "Share of replies with boilerplate",
    "distinct_openings": "Distinct openings, as a share of the replies",
    "accuracy": "Accuracy",
    "held_out_accuracy": "Accuracy on held-out pairs",
    "loss": "Loss",
    "held_out_loss": "Loss on held-out rows",
    "margin": "Margin: score of chosen less score of rejected",
    "chosen_reward": "Implicit reward",
    "nll": "Negative log-likelihood of the preferred reply (nats per token)",
    "mean_score": "Mean score",
    "token_accuracy": "Share of tokens predicted correctly",
    "entropy": "Entropy (nats per token)",
    "reward_std": "Standard deviation of the scores in a step",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "epoch": "Epoch",
}
# Columns that share the chart of another column with the same unit.
HELD_OUT = ("loss", "accuracy", "margin", "kl", "entropy", "reply_tokens", "cut_off_share", "no_reward_share")
TOGETHER = {f"held_out_{name}": name for name in HELD_OUT}
TOGETHER |= {"shaped_reward": "reward", "rejected_reward": "chosen_reward"}
NAMES = {
    **dict.fromkeys(HELD_OUT, "in training"),
    **{f"held_out_{name}": "held out" for name in HELD_OUT},
    "reward": "score",
    "shaped_reward": "score less penalties",
    "chosen_reward": "chosen replies",
    "rejected_reward": "rejected replies",
}
OPTIMISER = ("learning_rate", "grad_norm", "epoch")


def curves(step: StepFiles, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """Return (charts of the model, charts of the optimiser), one for each column or group of columns."""
    series = {name: points for name in _columns(rows) if (points := list(_points(rows, name)))}
    flagged = [float(at) for at, _ in flags(rows)]
    order = sorted(series, key=_place)
    charts = []
    for name in order:
        if TOGETHER.get(name) in series:
            continue
        group = [name, *(other for other, main in TOGETHER.items() if main == name and other in series)]
        names = NAMES if len(group) > 1 else {}
        plotted = [Series(names.get(n, n), [x for x, _ in series[n]], [y for _, y in series[n]]) for n in group]
        share = name.endswith(("_share", "accuracy"))
        charts.append((name, lines(f"{step.name}-{name}", _title(name), plotted, flags=flagged, share=share)))
    of_model = [chart for name, chart in charts if name not in OPTIMISER]
    return of_model, [chart for name, chart in charts if name in OPTIMISER]


def _place(name: str) -> int:
    """The place of a column's chart on the page."""
    places = list(TITLES)
    known = [title for title in (TOGETHER.get(name, name), name) if title in TITLES]
    return places.index(known[0]) if known else len(places)


def _title(name: str) -> str:
    """The title of a column's chart; one that is measured on held-out data only has that of its counterpart."""
    return TITLES.get(name) or TITLES.get(TOGETHER.get(name, name)) or name


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(key for row in rows for key in row) if name != "step"]


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(row.get("step"), int):
            yield row["step"], value


def flags(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return (step, reason) of every flag: a column that is true, or a `goodhart` column that is not empty."""
    flagged = []
    for row in rows:
        for name, value in row.items():
            if value is True or ("goodhart" in name and value):
                reason = name if isinstance(value, bool | int | float) else f"{name}: {value}"
                flagged.append((int(row["step"]), reason))
    return flagged


def calibration(step: StepFiles) -> Chart | None:
    """Return the reliability diagram of a preference model, if its manifest has a `calibration_curve`."""
    curve = step.metrics.get("calibration_curve")
    if not curve:
        return None
    note = "On the dashed line the predicted probability equals the mean label."
    error, expected = (step.metrics.get(f"calibration_error{of}") for of in ("", "_if_calibrated"))
    if error is not None and expected is not None:
        note += f" The calibration error is {error:.3f}; that of a calibrated model would be {expected:.3f} on average."
    return reliability(
        f"{step.name}-calibration",
        "Calibration on held-out pairs",
        [Bin(b["confidence"], b["label"], b["n"]) for b in curve],
        x_label="predicted probability of the preferred reply",
        note=note,
    )
