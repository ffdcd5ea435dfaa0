"""Votes become labels: orders are averaged, and votes refer to the chosen reply."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_cases import MANY, PRINCIPLE, Reader, judge_of, left_right

from cai_cli.data.schema import Preference, Rejected
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.base import Order, sigmoid
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import user


class Answers(ScriptedEngine):
    """Answers each question with the next of its log-probabilities."""

    def __init__(self, *answers: list[float] | RequestFailure) -> None:
        self.answers = list(answers)
        self.asked: list[LogprobRequest] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        self.asked += requests
        return [self.answers.pop(0) for _ in requests]


def label(engine: Engine, orders: tuple[Order, ...] = ("ab", "ba"), pairs: int = 1) -> list[Preference | Rejected]:
    return label_prefs([left_right(i) for i in range(pairs)], Labeller(judge_of(engine), [PRINCIPLE], 1, orders))


def logs(p: float) -> list[float]:
    """Unnormalised log-probabilities that give the first option the share `p`."""
    return [math.log(p) - 3, math.log(1 - p) - 3]


def test_both_orders_are_judged_and_averaged_and_votes_refer_to_the_chosen_reply() -> None:
    # In order left-right: left gets 0.6. Then right-left: right gets 0.9, so left 0.1. Left: 0.35, right wins.
    judge = Answers(logs(0.6), logs(0.9))
    (row,) = label(judge)
    assert isinstance(row, Preference)
    assert (row.chosen[0].content, row.rejected[0].content) == ("right", "left")
    assert row.p_chosen == pytest.approx(0.65)
    assert (row.id, row.source, row.prompt) == ("p0/0-1", "s", [user("q")])
    # "ab": the chosen reply stood first.
    assert [(v.order, round(v.p_first, 9)) for v in row.votes] == [("ba", 0.6), ("ab", 0.9)]
    assert {(v.principle_id, v.method, v.rationale) for v in row.votes} == {("kind", "choice", None)}
    first, second = (str(q.text) for q in judge.asked)
    assert first.index("[[[left]]]") < first.index("[[[right]]]")
    assert second.index("[[[right]]]") < second.index("[[[left]]]")
    assert all(q.options == ("A", "B") and q.prefill.endswith("(") for q in judge.asked)


@given(st.floats(0.001, 0.999))
def test_a_judge_with_pure_position_bias_yields_no_preference(p: float) -> None:
    (row,) = label(Answers(logs(p), logs(p)))
    assert isinstance(row, Preference)
    assert (row.id, row.p_chosen, row.chosen[0].content) == ("p0/0-1", 0.5, "left")


def test_orders_are_averaged_before_the_limits_apply() -> None:
    # Left gets 0.95 in first and 0.70 in second position: clamped first, 0.6 and 0.4 would be a tie.
    def labelled(clamp: tuple[float, float], *first: float) -> Preference:
        judge = judge_of(Answers(*(logs(p) for p in first)), clamp=clamp)
        (row,) = label_prefs([left_right()], Labeller(judge, [PRINCIPLE], 1, ("ab", "ba")))
        assert isinstance(row, Preference)
        return row

    row = labelled((0.4, 0.6), 0.95, 0.7)
    assert (row.chosen[0].content, row.p_chosen) == ("left", pytest.approx(0.6))
    assert [round(v.p_first, 9) for v in row.votes] == [0.95, 0.7]
    assert labelled((0.4, 0.6), 0.95, 0.85).p_chosen == pytest.approx(0.55)
    assert labelled((0.4, 0.6), 0.7, 0.95).chosen[0].content == "right"
    assert labelled((0.4, 0.6), 0.7, 0.95).p_chosen == pytest.approx(0.6)


@pytest.mark.parametrize("clamp", [(0.0, 0.7), (0.3, 1.0)])
def test_limits_hold_for_both_replies_because_their_sides_are_arbitrary(clamp: tuple[float, float]) -> None:
    for p in (0.05, 0.95):
        (row,) = label_prefs([left_right()], Labeller(judge_of(Answers(logs(p)), clamp=clamp), [PRINCIPLE], 1, ("ab",)))
        assert isinstance(row, Preference)
        assert row.p_chosen == pytest.approx(0.7)


def test_principles_are_averaged_before_the_limits_apply() -> None:
    engine = Answers(*(logs(p) for p in (0.99, 0.98, 0.3)))
    labeller = Labeller(judge_of(engine, clamp=(0.4, 0.6)), MANY[:3], 3, ("ab",))
    (row,) = label_prefs([left_right()], labeller)
    assert isinstance(row, Preference)
    assert row.p_chosen == 0.6  # the mean is 0.76; clamped first, it would be 0.53


@given(st.lists(st.tuples(*[st.lists(st.floats(-900, 0), min_size=2, max_size=2)] * 2), min_size=1), st.booleans())
def test_the_chosen_reply_has_at_least_one_half_by_its_votes(
    answers: list[tuple[list[float], list[float]]], both: bool
) -> None:
    orders: tuple[Order, ...] = ("ab", "ba") if both else ("ab",)
    rows = label(Answers(*(x for two in answers for x in two[: len(orders)])), orders, len(answers))
    assert [row.key for row in rows] == [f"p{i}/0-1" for i in range(len(answers))]
    for row in rows:
        assert isinstance(row, Preference)
        assert 0.5 <= row.p_chosen <= 1
        assert len(row.votes) == len(orders)
        shares = [v.p_first if v.order == "ab" else 1 - v.p_first for v in row.votes]
        assert math.fsum(shares) / len(shares) == pytest.approx(row.p_chosen, abs=1e-12)


@given(st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_shares_are_probabilities_that_sum_to_one(a: float, b: float) -> None:
    assert 0 <= sigmoid(a - b) <= 1
    assert sigmoid(a - b) + sigmoid(b - a) == pytest.approx(1)


def test_a_refusal_in_either_order_rejects_the_pair_with_its_reason() -> None:
    rows = label(Answers(logs(0.9), RequestFailure("too long"), logs(0.9), logs(0.2)), pairs=2)
    assert isinstance(rows[0], Rejected)
    assert rows[0].reason == "too long"
    assert isinstance(rows[1], Preference)


def test_a_nan_log_probability_is_not_a_vote() -> None:
    (row,) = label(Answers([math.nan, -1.0]), orders=("ab",))
    assert isinstance(row, Rejected)
    assert row.reason == "the judge's log-probabilities are not numbers"


def by_rule(text: str, _: Any) -> list[float] | RequestFailure:
    """Rule 0 and 1 like `left`, the others `right`; rule 4 answers only when `left` comes first."""
    rule = int(text[text.rindex("By rule ") + 8])
    left_first = text.rindex("[[[left]]]") < text.rindex("[[[right]]]")
    if rule == 4 and not left_first:
        return RequestFailure("too long")
    return [1.0, 0.0] if (rule < 2) == left_first else [0.0, 1.0]


def test_votes_are_kept_per_principle_and_order_and_a_half_answered_principle_has_none() -> None:
    labeller = Labeller(judge_of(Reader(by_rule)), MANY, 5, ("ab", "ba"))
    (row,) = label_prefs([left_right()], labeller)
    assert isinstance(row, Preference)
    assert row.p_chosen == pytest.approx(0.5)  # two against two
    (row,) = label_prefs([left_right()], Labeller(judge_of(Reader(by_rule)), MANY[1:], 4, ("ab", "ba")))
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx((2 * sigmoid(1) + sigmoid(-1)) / 3)
    assert sorted((v.principle_id, v.order) for v in row.votes) == [
        (f"rule{i}", order) for i in (1, 2, 3) for order in ("ab", "ba")
    ]


@given(st.integers(1, 5), st.integers(0, 99))
def test_the_principles_of_a_pair_are_drawn_without_repetition_and_grow_with_their_number(k: int, number: int) -> None:
    def drawn(count: int) -> list[str]:
        labeller = Labeller(judge_of(Reader()), MANY, count, ("ab",))
        return [c.principle.id for c in labeller.comparisons(left_right(number))]

    assert len(set(drawn(k))) == k
    assert drawn(5)[:k] == drawn(k)


def test_every_principle_is_drawn_about_equally_often() -> None:
    labeller = Labeller(judge_of(Reader()), MANY, 1, ("ab",))
    drawn = [c.principle.id for i in range(1000) for c in labeller.comparisons(left_right(i))]
    assert all(150 < drawn.count(p.id) < 250 for p in MANY)


def test_a_pair_exactly_at_the_minimum_confidence_is_kept() -> None:
    engine = Reader(say=lambda text, _: "(A)" if text.rindex("[[[left]]]") < text.rindex("[[[right]]]") else "(B)")
    labeller = Labeller(judge_of(engine, "verdict"), [PRINCIPLE], 1, ("ab", "ba"), min_confidence=1.0)
    (row,) = label_prefs([left_right()], labeller)
    assert isinstance(row, Preference)
    assert row.p_chosen == 1.0
