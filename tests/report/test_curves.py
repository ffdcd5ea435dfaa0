"""Curves: which columns share a chart, their order, and flags."""

from pathlib import Path
from typing import Any

from cai_cli.report.collect import StepFiles
from cai_cli.report.curves import TITLES, calibration, curves, flags
from cai_cli.runtime.summary import TRAINING_METRICS


def step(**metrics: Any) -> StepFiles:
    return StepFiles("pm", "train-pm", "done", Path("pm"), {"metrics": metrics}, {})


def test_held_out_columns_share_a_chart_and_the_optimiser_has_its_own() -> None:
    rows = [
        {"step": at, "learning_rate": 0.1, "mine": at, "loss": 1.0, "held_out_loss": 2.0, "reward": 0.5, "note": "x"}
        for at in (1, 2)
    ]
    of_model, of_optimiser = curves(step(), rows)
    assert [chart.id for chart in of_model] == ["pm-reward", "pm-loss", "pm-mine"]
    assert [chart.id for chart in of_optimiser] == ["pm-learning_rate"]
    assert set(of_model[1].legend) == {"in training", "held out"}


def test_columns_of_held_out_data_alone_have_the_title_and_the_place_of_their_counterparts() -> None:
    columns = ("held_out_kl", "rejected_reward", "chosen_reward", "held_out_margin", "margin", "implicit_reward")
    charts, _ = curves(step(), [{"step": at, **dict.fromkeys(columns, 0.5)} for at in (1, 2)])
    assert [chart.id for chart in charts] == ["pm-implicit_reward", "pm-held_out_kl", "pm-margin", "pm-chosen_reward"]
    assert charts[1].title == "KL divergence from the start model (nats per token)"
    assert set(charts[3].legend) == {"chosen replies", "rejected replies"}


def test_true_columns_and_goodhart_columns_with_a_reason_are_flags() -> None:
    rows = [{"step": 1, "goodhart": None, "ok": False}, {"step": 2, "goodhart": "length"}, {"step": 3, "broken": True}]
    assert flags(rows) == [(2, "goodhart: length"), (3, "broken")]


def test_a_reliability_diagram_needs_a_calibration_curve() -> None:
    assert calibration(step()) is None
    chart = calibration(step(calibration_curve=[{"confidence": 0.7, "label": 0.6, "n": 5}]))
    assert chart
    assert len(chart.rows) == 1


def test_every_metric_of_a_training_summary_has_a_title_in_the_report() -> None:
    assert set(TRAINING_METRICS) <= set(TITLES)
