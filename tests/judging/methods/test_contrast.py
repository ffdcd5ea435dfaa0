"""Replies scored as spoken by two characters."""

import pytest
from judge_cases import COMPARISONS, ORDERED_REPLIES, Recorder, judge
from label_cases import PRINCIPLE, Reader, judge_of, left_right

from cai_cli.data.schema import Preference
from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.judging.base import Judgement, sigmoid
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import (
    contrast_requests,
)


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_contrast_scores_both_replies_as_spoken_by_both_characters(form: PromptFormat) -> None:
    engine = Recorder([[-5.0, -9.0], [-6.0, -8.0], RequestFailure("long"), [0.0, 0.0], [-2.0, -3.0], [-9.0, -1.0]])
    found = judge(engine, "contrast", form).judge(COMPARISONS)
    assert found == [Judgement(sigmoid(2.0)), RequestFailure("long"), Judgement(sigmoid(9.0))]
    expected = [
        LogprobRequest(r.text, replies, r.prefill, row=c.pair.id)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
        for r in contrast_requests(c.pair.prompt, c.principle, form)
    ]
    assert engine.questions == expected
    engine = Recorder([[0.0, 0.0], RequestFailure("breaking")])
    assert judge(engine, "contrast", form).judge(COMPARISONS[:1]) == [RequestFailure("breaking")]


def test_a_contrast_is_the_difference_of_the_differences() -> None:
    principle = PRINCIPLE.model_copy(update={"following": "Be kind.", "breaking": "Be rude."})
    told = {"Be kind.": [-5.0, -7.0], "Be rude.": [-4.0, -8.0]}  # left: -1, right: +1
    engine = Reader(lambda text, options: next(v for k, v in told.items() if k in text))
    (row,) = label_prefs([left_right()], Labeller(judge_of(engine, "contrast"), [principle], 1, ("ab",)))
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx(sigmoid(2.0))
