import math
import random

import pytest

from cai_cli.data.schema import JudgedPair
from cai_cli.metrics.intervals import SHARE, mean_estimate
from cai_cli.metrics.preference_model import (
    accuracy,
    accuracy_warning,
    calibration,
    held_out_metrics,
    length_correlation,
    loss_metrics,
)


def pair(
    margin: float,
    p: float = 1.0,
    tokens: tuple[int, int] = (5, 7),
    source: str | None = "s",
    base: float = 0.0,
    prompt: str | None = None,
) -> JudgedPair:
    return JudgedPair(
        id="p",
        prompt_id=prompt,
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
    assert metrics["accuracy"] == mean_estimate([1, 0, 0], SHARE)
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
    assert accuracy_warning(None, 0) == held_out_metrics([pair(1.0, p=0.5)])["note"]


def test_accuracy_is_counted_by_source() -> None:
    rows = [pair(1.0, source="human")] * 3 + [pair(-1.0, source="ai")] * 2 + [pair(1.0, source=None)]
    by_source = held_out_metrics(rows)["accuracy_by_source"]
    shares = {"ai": [0.0] * 2, "human": [1.0] * 3, "no source": [1.0]}
    assert by_source == {name: mean_estimate(right, SHARE, among=3) for name, right in shares.items()}


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


def independent_of_the_labels(rng: random.Random, prompts: int, pairs: int) -> list[JudgedPair]:
    """Pairs of one reply with each of the others of its prompt, ranked by a judge and, independently, by a model."""
    found = []
    for prompt in range(prompts):
        judge, model = ([rng.gauss(0, 1) for _ in range(pairs + 1)] for _ in range(2))
        for other in range(1, pairs + 1):
            margin = model[0] - model[other]
            found.append(pair(margin if judge[0] > judge[other] else -margin, 0.9, prompt=str(prompt)))
    return found


@pytest.mark.parametrize("prompts", [20, 60])
def test_a_model_independent_of_the_labels_is_at_chance_in_nineteen_of_twenty_runs(prompts: int) -> None:
    """As independent pairs, eight a prompt, the interval excluded one half in 13 to 16 of a hundred runs."""
    rng, runs = random.Random(prompts), 300
    found = [accuracy(independent_of_the_labels(rng, prompts, 8)) for _ in range(runs)]
    assert sum(not e["low"] <= 0.5 <= e["high"] for e in found if e) / runs < 0.07


def test_a_good_model_is_above_chance_with_several_pairs_a_prompt() -> None:
    rng = random.Random(3)
    rows = [pair(rng.gauss(1, 1), 0.9, prompt=str(i % 40)) for i in range(160)]
    metrics = held_out_metrics(rows)
    assert (metrics["at_chance"], metrics["note"], metrics["held_out_prompts"]) == (False, None, 40)


def test_too_few_prompts_are_named_as_the_reason() -> None:
    metrics = held_out_metrics([pair(1.0, prompt=str(i % 3)) for i in range(60)])
    assert (metrics["at_chance"], metrics["held_out_prompts"]) == (True, 3)
    assert "3 prompts, too few for any result: 7 or more are needed" in metrics["note"]


def test_repeated_pairs_of_a_prompt_do_not_narrow_the_interval_of_the_length_correlation() -> None:
    rng = random.Random(2)
    lengths = [(rng.randrange(1, 200), rng.randrange(1, 200)) for _ in range(40)]
    rows = [pair(rng.gauss((a - b) / 100, 1), tokens=(a, b), prompt=str(i)) for i, (a, b) in enumerate(lengths)]
    once, often = length_correlation(rows), length_correlation(rows * 6)
    assert once is not None
    assert often is not None
    assert often["value"] == pytest.approx(once["value"])
    assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=0.05)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("pairs", [1, 4])
def test_the_calibration_error_stands_beside_that_of_a_calibrated_model(hard: bool, pairs: int) -> None:
    """A calibrated model has a positive error by chance, and over many runs its mean is the one that is stated."""
    rng, found = random.Random(pairs), []
    for _ in range(60):
        rows = []
        for i in range(60):
            q = rng.choice((0.55, 0.7, 0.85, 0.95))
            p = (1.0 if rng.random() < q else 0.0) if hard else rng.betavariate(4 * q, 4 * (1 - q))
            # `chosen` is the reply that the label prefers; the model prefers it where p > 0.5
            margin = logit(q) if p > 0.5 else -logit(q)
            rows += [pair(margin, max(p, 1 - p), prompt=str(i))] * pairs
        found.append(calibration(rows))
    errors, stated = ([run[f"calibration_error{of}"] for run in found] for of in ("", "_if_calibrated"))
    assert sum(errors) / 60 > 0.02
    assert sum(stated) / 60 == pytest.approx(sum(errors) / 60, rel=0.1)
    sure = calibration([pair(3.0 if rng.random() < 0.6 else -3.0, prompt=str(i)) for i in range(200)])
    assert sure["calibration_error"] > 2 * sure["calibration_error_if_calibrated"]
