"""What identifies a comparison, and the arithmetic of two options."""

import math

import pytest
from judge_cases import COMPARISONS, KIND, ORDERED_REPLIES, TRUE, Recorder, judge, pair

from cai_cli.common.seeds import seed_for
from cai_cli.judging.base import PairComparison, sigmoid
from cai_cli.prompting.arrangements import ARRANGEMENTS


def test_replies_are_in_the_order_of_the_comparison() -> None:
    assert [c.ordered_replies for c in COMPARISONS] == ORDERED_REPLIES


def test_the_seed_of_a_comparison_depends_on_everything_that_identifies_it() -> None:
    assert COMPARISONS[1].seed(3) == seed_for(3, "judgement", "p0", "kind", "ba", 1)
    others = [
        PairComparison(pair(1), KIND, "ba", 1), PairComparison(pair(0), TRUE, "ba", 1), PairComparison(pair(0), KIND, "ab", 1),
        PairComparison(pair(0), KIND, "ba", 2),
    ]  # fmt: skip
    assert len({COMPARISONS[1].seed(3), COMPARISONS[1].seed(4), *(c.seed(3) for c in others)}) == 6


def test_the_share_of_two_options_is_exact_and_never_overflows() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75, abs=1e-15)
    assert (sigmoid(-1e9), sigmoid(1e9)) == (pytest.approx(0.0, abs=1e-300), 1.0)
    assert sigmoid(-700.0) > 0


def test_both_orders_of_a_pair_see_the_same_arrangement_and_pairs_share_a_few() -> None:
    asked = judge(Recorder(), "choice")
    seen = [asked.arrangement(pair(number)) for number in range(200)]
    assert seen == [asked.arrangement(pair(number)) for number in range(200)]
    assert all(30 < seen.count(arrangement) < 70 for arrangement in range(ARRANGEMENTS))
    assert asked.examples_for(pair(3)) is asked.arrangements[seen[3]]
