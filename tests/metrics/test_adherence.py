"""Differences between models: claimed where they are, and hardly ever where they are not."""

import random

import pytest

from cai_cli.metrics.adherence import difference


@pytest.mark.parametrize(("scenarios", "conversations"), [(2, 1), (2, 4)])
def test_models_that_are_alike_get_a_claim_in_at_most_one_result_of_twenty(scenarios: int, conversations: int) -> None:
    rng, results, principles = random.Random(5), 25, 32
    claimed = 0
    for _ in range(results):
        estimates = []
        for _ in range(principles):
            keys = [f"p/{scenario}/{number}" for scenario in range(scenarios) for number in range(conversations)]
            one, other = ({key: [float(rng.random() < 0.6) for _ in range(3)] for key in keys} for _ in range(2))
            estimates.append(difference(one, other, principles))
        claimed += any(e is not None and (e["low"] > 0 or e["high"] < 0) for e in estimates)
    assert claimed <= 3  # with a chance of 5% each, more than three of 25 have a probability of 3%


def test_equal_differences_in_two_conversations_show_nothing() -> None:
    one, other = (
        {"p/1/0": [1.0, 1.0, 1.0], "p/2/0": [1.0, 1.0, 1.0]},
        {"p/1/0": [1.0, 1.0, 0.0], "p/2/0": [0.0, 1.0, 1.0]},
    )
    estimate = difference(one, other, 32)
    assert estimate is not None
    assert (estimate["low"], estimate["high"]) == (-1.0, 1.0)


def test_only_conversations_that_both_models_had_are_compared() -> None:
    one, other = {"p/1/0": [1.0], "p/1/1": [0.0], "p/1/2": [1.0]}, {"p/1/0": [0.0], "p/1/1": [0.0], "p/1/3": [1.0]}
    estimate = difference(one, other, 1)
    assert estimate is not None
    assert (estimate["value"], estimate["n"]) == (-0.5, 2)
    assert difference(one, {}, 1) is None
