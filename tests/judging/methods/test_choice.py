"""Choice by log-probabilities, and its calibration."""

import pytest
from judge_cases import COMPARISONS, ORDERED_REPLIES, Recorder, judge
from label_cases import MANY, PRINCIPLE, Reader, judge_of, left_right

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Preference
from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.judging.base import Judgement, sigmoid
from cai_cli.judging.methods.choice import CONTENT_FREE
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import PromptFormat, user
from cai_cli.prompting.comparison import (
    OPTIONS,
    comparison_request,
    fence,
)


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_choice_sends_each_comparison_once_and_normalises_its_two_letters(form: PromptFormat) -> None:
    engine = Recorder([[-1.0, -3.0], RequestFailure("too long"), [-5.0, -4.0]])
    asked = judge(engine, "choice", form)
    found = asked.judge(COMPARISONS)
    assert found == [Judgement(sigmoid(2.0)), RequestFailure("too long"), Judgement(sigmoid(-1.0))]
    requests = [
        comparison_request(c.pair.prompt, c.principle.comparison, replies, asked.examples_for(c.pair), form)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
    ]
    assert engine.questions == [
        LogprobRequest(r.text, OPTIONS, r.prefill, row=c.pair.id) for c, r in zip(COMPARISONS, requests, strict=True)
    ]


def test_calibration_subtracts_the_mean_log_odds_of_three_content_free_pairs_once_for_each_principle_and_arrangement() -> (
    None
):
    empty = [[0.0, -1.0], [0.0, -2.0], [-3.0, 0.0], [0.0, -4.0], [0.0, -4.0], [0.0, -1.0]]  # means: 0 and 3
    engine = Recorder([*empty, [0.0, -2.0], [0.0, -2.0], [0.0, -2.0]])
    asked = judge(engine, "choice", calibrate=True)
    values = [a.p_first for a in asked.judge(COMPARISONS) if isinstance(a, Judgement)]
    assert values == pytest.approx([sigmoid(2.0), sigmoid(2.0), sigmoid(-1.0)])
    blanks = [
        comparison_request([user("N/A")], c.principle.comparison, (free, free), asked.examples_for(c.pair), "chat")
        for c in (COMPARISONS[0], COMPARISONS[2])
        for free in CONTENT_FREE
    ]
    assert engine.questions[:6] == [LogprobRequest(r.text, OPTIONS, r.prefill, row="blank") for r in blanks]
    engine.scores = [[0.0, -3.0]]
    assert asked.judge(COMPARISONS[2:]) == [Judgement(sigmoid(0.0))]
    assert len(engine.questions) == 10


def test_calibration_fails_where_a_content_free_pair_is_not_answered() -> None:
    engine = Recorder([[0.0, -1.0], RequestFailure("filtered"), [0.0, -1.0]])
    with pytest.raises(CaiError) as error:
        judge(engine, "choice", calibrate=True).judge(COMPARISONS[:1])
    assert error.value.code == "request-failed"
    assert error.value.message.endswith("'kind': filtered")


def leaning(text: str, options: tuple[str, ...]) -> list[float]:
    """Likes the letter A by 2 nats and the reply `right` by 1."""
    blank = any(f"(A) {fence(free)}" in text for free in CONTENT_FREE)
    first_is_right = text.rindex("[[[right]]]") < text.rindex("[[[left]]]") if not blank else None
    return [2.0 + {True: 1.0, False: -1.0, None: 0.0}[first_is_right], 0.0]


def test_calibration_removes_the_letter_bias_and_keeps_the_preference() -> None:
    labeller = Labeller(judge_of(Reader(leaning), calibrate=True), [PRINCIPLE], 1, ("ab", "ba"))
    (row,) = label_prefs([left_right()], labeller)
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx(sigmoid(1.0))
    assert sorted(v.p_first for v in row.votes) == pytest.approx([sigmoid(-1.0), sigmoid(1.0)])
    (raw,) = label_prefs([left_right()], Labeller(judge_of(Reader(leaning)), [PRINCIPLE], 1, ("ab", "ba")))
    assert isinstance(raw, Preference)
    assert all(v.p_first > 0.5 for v in raw.votes)


def test_every_principle_is_calibrated_on_its_own() -> None:
    """Under rule N the judge likes A by N nats, and nothing else."""
    engine = Reader(lambda text, _: [float(text[text.rindex("By rule ") + 8]), 0.0])
    labeller = Labeller(judge_of(engine, calibrate=True), MANY, 5, ("ab",))
    comparisons = list(labeller.comparisons(left_right()))
    answers = labeller.judge.judge(comparisons)
    assert [a.p_first for a in answers if isinstance(a, Judgement)] == pytest.approx([0.5] * 5)
