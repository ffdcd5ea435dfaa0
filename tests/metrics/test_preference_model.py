import math
import random

import pytest

from cai_cli.data.schema import JudgedPair
from cai_cli.metrics.intervals import wilson
from cai_cli.metrics.preference_model import (
    accuracy_warning,
    calibration,
    held_out_metrics,
    length_correlation,
    loss_metrics,
)


def pair(
    margin: float, p: float = 1.0, tokens: tuple[int, int] = (5, 7), source: str | None = "s", base: float = 0.0
) -> JudgedPair:
    return JudgedPair(
        id="p",
        source=source,
        p_chosen=p,
        chosen_score=base + margin,
        rejected_score=base,
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
    )


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_ties_are_left_out_of_the_accuracy_and_equal_scores_are_wrong() -> None:
    metrics = held_out_metrics([pair(1, p=0.5), pair(0, p=0.9), pair(-1, p=0.9), pair(1, p=0.9)])
    assert metrics["accuracy"] == wilson(1, 3)
    assert held_out_metrics([pair(0.0) for _ in range(200)])["accuracy"]["high"] < 0.02  # a constant model


def test_the_loss_is_bounded_below_by_the_entropy_of_the_labels() -> None:
    exact = loss_metrics([pair(logit(p), p=p) for p in (0.6, 0.9)])
    assert exact["loss_gap"] == pytest.approx(0, abs=1e-12)
    assert exact["label_entropy"] == pytest.approx(
        sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.6, 0.9)) / 2
    )
    untrained = loss_metrics([pair(0.0, p=p) for p in (0.6, 0.9)])
    assert untrained["held_out_loss"] == pytest.approx(math.log(2))
    assert untrained["loss_gap"] == pytest.approx(math.log(2) - exact["label_entropy"])
    assert loss_metrics([pair(1.0)])["label_entropy"] == 0  # a human label leaves nothing open


def test_a_huge_margin_gives_a_finite_loss() -> None:
    assert loss_metrics([pair(-4000.0)])["held_out_loss"] == pytest.approx(4000.0)
    assert loss_metrics([pair(4000.0)])["held_out_loss"] == pytest.approx(0.0)


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has() -> None:
    rng = random.Random(0)
    honest = [rng.choice((0.55, 0.65, 0.75, 0.85, 0.95)) for _ in range(4000)]
    # The side the model prefers is the label's with the probability it says.
    sides = [1 if rng.random() < q else -1 for q in honest]
    metrics = calibration([pair(side * logit(q)) for q, side in zip(honest, sides, strict=True)])
    assert metrics["calibration_error"] < 0.03
    assert [b["n"] > 600 for b in metrics["calibration_curve"]] == [True] * 5
    assert sum(b["n"] for b in metrics["calibration_curve"]) == 4000
    sure = calibration([pair(side * 10.0) for side in sides])
    assert sure["calibration_error"] == pytest.approx(1 - sides.count(1) / 4000, abs=0.01)
    (only,) = sure["calibration_curve"]
    assert (only["from"], only["to"], only["n"]) == (0.9, 1.0, 4000)


def test_a_model_that_gives_soft_labels_exactly_is_calibrated() -> None:
    assert calibration([pair(logit(p), p=p) for p in (0.6, 0.7, 0.9)])["calibration_error"] == pytest.approx(0)


def test_an_accuracy_whose_interval_contains_one_half_is_reported_as_chance() -> None:
    coin = held_out_metrics([pair(1.0 if i % 2 else -1.0) for i in range(100)])
    assert coin["at_chance"] is True
    assert "cannot be distinguished from chance: right on 50.0% of 100" in coin["note"]
    good = held_out_metrics([pair(1.0 if i % 10 else -1.0) for i in range(100)])
    assert (good["at_chance"], good["note"]) == (False, None)
    reversed_labels = held_out_metrics([pair(-1.0) for _ in range(100)])
    assert reversed_labels["at_chance"] is False
    assert "worse than chance" in reversed_labels["note"]


def test_without_held_out_pairs_the_metrics_are_none() -> None:
    metrics = held_out_metrics([])
    assert metrics["accuracy"] is metrics["at_chance"] is metrics["held_out_loss"] is metrics["score_std"] is None
    assert "No pair" in metrics["note"]
    assert accuracy_warning(None) == held_out_metrics([pair(1.0, p=0.5)])["note"]


def test_accuracy_is_counted_by_source() -> None:
    rows = [pair(1.0, source="human")] * 3 + [pair(-1.0, source="ai")] * 2 + [pair(1.0, source=None)]
    by_source = held_out_metrics(rows)["accuracy_by_source"]
    assert by_source == {"ai": wilson(0, 2), "human": wilson(3, 3), "no source": wilson(1, 1)}


def test_the_spread_of_scores_is_over_replies() -> None:
    metrics = held_out_metrics([pair(2.0, base=-1.0), pair(2.0, base=-1.0)])
    assert (metrics["score_mean"], metrics["score_std"]) == (0.0, 1.0)


def test_a_length_bias_is_found_and_none_where_there_is_none() -> None:
    rng = random.Random(1)
    lengths = [(rng.randrange(1, 200), rng.randrange(1, 200)) for _ in range(200)]
    longer = [pair(a - b + rng.gauss(0, 30), tokens=(a, b), base=b) for a, b in lengths]
    found = length_correlation(longer)
    assert found is not None
    assert found["low"] > 0.8
    assert (found["n"], found["value"] <= found["high"]) == (400, True)
    indifferent = length_correlation([pair(rng.gauss(0, 1), tokens=ab, base=rng.gauss(0, 1)) for ab in lengths])
    assert indifferent is not None
    assert indifferent["low"] < 0 < indifferent["high"]
    assert length_correlation([pair(0.0, tokens=ab) for ab in lengths]) is None
