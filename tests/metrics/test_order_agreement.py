"""Whether a judge reads the replies, tested on judges of known position bias, preference and noise."""

import random
from collections.abc import Iterator

import pytest
from label_rows import pref

from cai_cli.data.schema import Preference
from cai_cli.judging.base import sigmoid
from cai_cli.metrics.label_audit import audit
from cai_cli.metrics.order_agreement import log_odds, order_sums


def planted(
    pairs: int,
    *,
    bias: float,
    preference: float,
    noise: float,
    seed: int,
    bias_spread: float = 0.0,
    per_prompt: int = 1,
) -> Iterator[Preference]:
    """Labels of a judge whose log-odds are a position bias, its normal preference (sd) and normal noise (sd)."""
    rng = random.Random(f"{pairs} {bias} {preference} {noise} {seed}")
    for i in range(pairs):
        own_bias, prefers = rng.gauss(bias, bias_spread), rng.gauss(0, preference)
        first = sigmoid(own_bias + prefers + rng.gauss(0, noise))
        second = sigmoid(own_bias - prefers + rng.gauss(0, noise))
        a_wins = first >= second
        # In a row the order "ab" is the one in which the chosen reply came first.
        votes = [("kind", "ab", first if a_wins else second), ("kind", "ba", second if a_wins else first)]
        human = "chosen" if (prefers > 0) == a_wins else "rejected"
        yield pref(i, *votes, human=human, prompt=i // per_prompt)


def without_humans(rows: Iterator[Preference]) -> list[Preference]:
    return [row.model_copy(update={"human": None}) for row in rows]


@pytest.mark.parametrize("bias", [0.0, 2.0, 4.0, -20.0])
def test_a_position_bias_that_cancels_in_the_label_is_no_reason_to_distrust_it(bias: float) -> None:
    rows = list(planted(500, bias=bias, preference=1.0, noise=0.0, seed=1))
    found = audit(rows)
    assert found["agreement"]["value"] == 1.0  # every label is right
    assert found["trusted"] is True
    blind = audit(without_humans(iter(rows)))
    assert blind["reads_replies"] is True
    assert blind["trusted"] is None  # nobody knows whether humans agree
    assert blind["reason"].startswith("agreement is unknown without human labels; the judge's preferences in the two ")
    assert blind["between_orders"]["value"] > 0.99
    assert blind["position_log_odds"]["value"] == pytest.approx(bias, abs=1e-3)
    assert blind["preference_spread"]["low"] < 1 < blind["preference_spread"]["high"]


@pytest.mark.parametrize(("bias", "per_prompt"), [(0.0, 1), (4.0, 1), (4.0, 4)])
def test_a_judge_that_answers_with_noise_is_seldom_said_to_read(bias: float, per_prompt: int) -> None:
    runs = [
        audit(without_humans(planted(80, bias=bias, preference=0.0, noise=1.0, seed=seed, per_prompt=per_prompt)))[
            "trusted"
        ]
        for seed in range(40)
    ]
    assert runs.count(False) >= 36
    assert runs.count(True) == 0


def test_a_preference_within_noise_is_found() -> None:
    found = [
        audit(without_humans(planted(200, bias=4.0, preference=0.7, noise=1.0, seed=seed)))["reads_replies"]
        for seed in range(10)
    ]
    assert found.count(True) >= 9


def test_a_bias_that_differs_between_pairs_hides_a_smaller_preference_and_not_a_larger_one() -> None:
    hidden = audit(without_humans(planted(200, bias=1.0, bias_spread=1.0, preference=0.3, noise=0.0, seed=0)))
    assert hidden["reads_replies"] is False
    assert hidden["between_orders"]["high"] < 0
    plain = audit(without_humans(planted(200, bias=1.0, bias_spread=0.5, preference=1.0, noise=0.0, seed=0)))
    assert plain["reads_replies"] is True


def test_a_pair_counts_once_by_the_mean_over_its_principles_and_votes_without_a_second_order_are_left_out() -> None:
    row = pref(1, ("a", "ab", 0.9), ("a", "ba", 0.4), ("b", "ab", 0.6), ("b", "ba", 0.6), ("c", "ab", 0.99))
    groups = [[v for v in row.votes if v.principle_id == name] for name in "abc"]
    sums = order_sums(groups)
    preference = ((log_odds(0.9) - log_odds(0.4)) / 2 + 0) / 2
    position = ((log_odds(0.9) + log_odds(0.4)) / 2 + log_odds(0.6)) / 2
    assert sums["ordered"] == 1
    assert sums["preference_squares"] == pytest.approx(preference**2)
    assert sums["position"] == pytest.approx(position)
    assert order_sums(groups[2:]) == {}


def test_certain_answers_have_finite_log_odds() -> None:
    rows = [pref(i, ("kind", "ab", 1.0), ("kind", "ba", 0.0)) for i in range(20)]
    assert audit(rows)["between_orders"]["value"] == 1.0
    assert audit(rows)["between_orders"]["low"] > 0


def nine_first_picks_in_ten(pairs: int, method: str) -> list[Preference]:
    """Labels of a judge that picks the first reply in nine of ten answers, and of no pair the second in both orders.

    For a judge that does not read, that is the expected number up to a hundred pairs, rounded down.
    """
    rows = []
    for i in range(pairs):
        changes = i % 10 < 2
        votes = [("kind", "ab", 0.999), ("kind", "ba", 0.001 if changes else 0.999)]
        row = pref(i, *votes, human=None, prompt=i)
        rows.append(row.model_copy(update={"votes": [v.model_copy(update={"method": method}) for v in row.votes]}))
    return rows


@pytest.mark.parametrize("method", ["cot", "verdict"])
@pytest.mark.parametrize("pairs", [20, 50, 90])
def test_picks_of_the_second_position_that_are_too_rare_to_occur_twice_are_no_sign_of_reading(
    pairs: int, method: str
) -> None:
    found = audit(nine_first_picks_in_ten(pairs, method))
    assert found["reads_replies"] is False
    assert found["trusted"] is False
    assert found["content"]["low"] == 0
