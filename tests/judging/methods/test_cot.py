"""Rationales before the choice."""

import math

import pytest
from judge_cases import COMPARISONS, ORDERED_REPLIES, SAMPLING, Recorder, judge
from label_cases import PRINCIPLE, Reader, judge_of, left_right

from cai_cli.data.schema import Preference, Rejected
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure
from cai_cli.judging.base import Judgement, sigmoid
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import (
    OPTIONS,
    answer_after,
    rationale_request,
)


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_rationales_are_generated_by_seed_and_answered_in_their_own_comparison(form: PromptFormat) -> None:
    replies = [
        Completion(" left is kinder \n", "stop"),
        RequestFailure("filtered"),
        Completion("\tright is truer", "length"),
    ]
    engine = Recorder([[-1.0, -2.0], [-4.0, -1.0]], replies)
    asked = judge(engine, "cot", form)
    found = asked.judge(COMPARISONS)
    assert found == [Judgement(sigmoid(1.0), "left is kinder"), RequestFailure("filtered"), Judgement(sigmoid(-3.0), "right is truer")]  # fmt: skip
    requests = [
        rationale_request(c.pair.prompt, c.principle.comparison, replies, asked.examples_for(c.pair), form)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
    ]
    assert engine.asks == [
        GenerationRequest(r.text, c.seed(3), r.prefill, r.stop, row=c.pair.id)
        for c, r in zip(COMPARISONS, requests, strict=True)
    ]
    assert engine.samplings == [SAMPLING]
    letters = [answer_after(" left is kinder", requests[0], form), answer_after("\tright is truer", requests[2], form)]
    assert engine.questions == [
        LogprobRequest(r.text, OPTIONS, r.prefill, row=name) for name, r in zip(("p0", "p1"), letters, strict=True)
    ]


def test_an_empty_rationale_is_not_a_vote_and_the_others_keep_theirs() -> None:
    engine = Recorder(
        [[-1.0, -2.0], [-1.0, -3.0]], [Completion("a", "stop"), Completion(" \n", "stop"), Completion("c", "stop")]
    )
    found = judge(engine, "cot").judge(COMPARISONS)
    assert found == [Judgement(sigmoid(1.0), "a"), RequestFailure("empty rationale"), Judgement(sigmoid(2.0), "c")]


def test_rationales_and_their_votes_are_kept_and_the_mean_is_clamped() -> None:
    engine = Reader(lambda text, _: [0.0, -9.0] if "left wins" in text else [-9.0, 0.0],
                    lambda _, seed: " left wins" if seed % 2 else " right wins")  # fmt: skip
    labeller = Labeller(judge_of(engine, "cot", clamp=(0.4, 0.6)), [PRINCIPLE], 1, ("ab",), samples=5)
    (row,) = label_prefs([left_right()], labeller)
    assert isinstance(row, Preference)
    assert len({ask.seed for ask in engine.asked}) == len(row.votes) == 5
    assert {v.rationale for v in row.votes} <= {"left wins", "right wins"}
    for vote in row.votes:
        # In a row the order refers to the chosen reply; a vote is for the first reply in either.
        assert vote.p_first == pytest.approx(sigmoid(9.0) if vote.rationale == "left wins" else sigmoid(-9.0))
    p_left = math.fsum(v.p_first for v in row.votes) / 5
    assert abs(p_left - 0.5) > 0.09
    assert row.p_chosen == pytest.approx(min(0.6, max(p_left, 1 - p_left)))


def test_an_empty_rationale_and_an_unparseable_verdict_give_no_votes() -> None:
    for method, said in (("cot", "empty rationale"), ("verdict", "no verdict in the answer")):
        engine = Reader(lambda *_: [0.0, -1.0], lambda *_: " ")
        (row,) = label_prefs([left_right()], Labeller(judge_of(engine, method), [PRINCIPLE], 1, ("ab", "ba")))
        assert isinstance(row, Rejected)
        assert row.reason == said
