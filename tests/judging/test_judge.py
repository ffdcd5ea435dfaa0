"""Judging methods: the exact requests of each, and which answer belongs to which comparison."""

import pytest
from judge_cases import COMPARISONS, SAMPLING, Recorder, judge

from cai_cli.engines.base import Completion, RequestFailure
from cai_cli.judging.base import Judgement, sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.methods import METHODS, Method


@pytest.mark.parametrize("method", [m for m in Method if m != "verdict"])
def test_an_engine_that_answers_too_few_is_an_error_and_shifts_no_vote(method: str) -> None:
    engine = Recorder([[-1.0, -2.0]], [Completion("a", "stop")])
    with pytest.raises(ValueError, match="shorter"):
        judge(engine, method).judge(COMPARISONS)


def test_judgements_are_the_judges_own_probabilities_whatever_the_clamp() -> None:
    engine = Recorder(
        [[0.0, -50.0], [-50.0, 0.0]], [Completion("a", "stop"), Completion("b", "stop"), RequestFailure("no")]
    )
    asked = Judge(engine, "cot", [], "chat", 0, SAMPLING, clamp=(0.4, 0.6))
    assert asked.judge(COMPARISONS) == [
        Judgement(sigmoid(50.0), "a"),
        Judgement(sigmoid(-50.0), "b"),
        RequestFailure("no"),
    ]


def test_every_judging_method_is_registered() -> None:
    assert set(METHODS) == set(Method)
