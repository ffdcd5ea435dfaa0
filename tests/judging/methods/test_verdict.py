"""Verdicts in words."""

import pytest
from judge_cases import COMPARISONS, ORDERED_REPLIES, SAMPLING, Recorder, judge
from label_cases import PRINCIPLE, Reader, judge_of, left_right

from cai_cli.data.schema import Preference
from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure
from cai_cli.judging.base import Judgement
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import (
    verdict_request,
)


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_verdict_is_one_or_zero_or_a_failure_of_its_own_comparison(form: PromptFormat) -> None:
    engine = Recorder(
        replies=[Completion("(B)", "stop"), RequestFailure("filtered"), Completion("The answer is: (A)", "stop")]
    )
    asked = judge(engine, "verdict", form)
    found = asked.judge(COMPARISONS)
    assert found == [Judgement(0.0), RequestFailure("filtered"), Judgement(1.0)]
    requests = [
        verdict_request(c.pair.prompt, c.principle.comparison, replies, asked.examples_for(c.pair), form)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
    ]
    assert engine.asks == [
        GenerationRequest(r.text, c.seed(3), r.prefill, r.stop, row=c.pair.id)
        for c, r in zip(COMPARISONS, requests, strict=True)
    ]
    assert engine.samplings == [SAMPLING]
    engine = Recorder(replies=[Completion("both", "stop")])
    assert judge(engine, "verdict", form).judge(COMPARISONS[:1]) == [RequestFailure("no verdict in the answer")]


def test_verdicts_in_words_are_votes_of_zero_or_one() -> None:
    engine = Reader(say=lambda text, _: "(A)" if text.rindex("[[[left]]]") < text.rindex("[[[right]]]") else "(B)")
    (row,) = label_prefs([left_right()], Labeller(judge_of(engine, "verdict"), [PRINCIPLE], 1, ("ab", "ba")))
    assert isinstance(row, Preference)
    assert (row.chosen[0].content, row.p_chosen) == ("left", 1.0)
    assert [(v.order, v.p_first) for v in row.votes] == [("ab", 1.0), ("ba", 0.0)]
