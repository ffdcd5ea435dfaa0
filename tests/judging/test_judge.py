"""Judging methods: the exact requests of each, and which answer belongs to which comparison."""

import math
from collections.abc import Sequence

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.base import Judgement, PairComparison, sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.methods import METHODS, Method
from cai_cli.judging.methods.choice import CONTENT_FREE
from cai_cli.prompting.base import PromptFormat, assistant, user
from cai_cli.prompting.comparison import (
    OPTIONS,
    answer_after,
    comparison_request,
    contrast_requests,
    rationale_request,
    verdict_request,
)

KIND = PreferencePrinciple(id="kind", comparison="Which is kinder?", following="Be kind.", breaking="Be rude.")
TRUE = PreferencePrinciple(id="true", comparison="Which is truer?", following="Be true.", breaking="Lie.")
EXAMPLE = ComparisonExample(
    messages=[user("1 + 1?")],
    comparison=None,
    options=["two", "three"],
    answer="A",
    rationale="Sums are known.",
)
SAMPLING = Sampling(max_new_tokens=7)


class Recorder(ScriptedEngine):
    """Gives the planned answers in order, and records the requests."""

    def __init__(
        self, scores: Sequence[list[float] | RequestFailure] = (), replies: Sequence[Completion | RequestFailure] = ()
    ) -> None:
        self.scores, self.replies = list(scores), list(replies)
        self.questions: list[LogprobRequest] = []
        self.asks: list[GenerationRequest] = []
        self.samplings: list[Sampling] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        self.questions += requests
        taken, self.scores = self.scores[: len(requests)], self.scores[len(requests) :]
        return taken

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        self.asks += asks
        self.samplings.append(sampling)
        return self.replies


def pair(number: int) -> Pair:
    return Pair(
        id=f"p{number}", prompt=[user(f"question {number}")], a=[assistant(f"left {number}")],
        b=[assistant(f"right {number}")], human=None, source=None,
    )  # fmt: skip


# Both orders, two principles, two pairs and two rationales: no two alike in anything that counts.
COMPARISONS = [
    PairComparison(pair(0), KIND, "ab"),
    PairComparison(pair(0), KIND, "ba", 1),
    PairComparison(pair(1), TRUE, "ab", 2),
]
ORDERED_REPLIES = [("left 0", "right 0"), ("right 0", "left 0"), ("left 1", "right 1")]


def judge(engine: Recorder, method: str, form: PromptFormat = "chat", **settings: bool) -> Judge:
    return Judge(engine, method, [EXAMPLE], form, 3, SAMPLING, **settings)


def test_replies_are_in_the_order_of_the_comparison() -> None:
    assert [c.ordered_replies for c in COMPARISONS] == ORDERED_REPLIES


def test_the_seed_of_a_comparison_depends_on_everything_that_identifies_it() -> None:
    assert COMPARISONS[1].seed(3) == seed_for(3, "judgement", "p0", "kind", "ba", 1)
    others = [
        PairComparison(pair(1), KIND, "ba", 1), PairComparison(pair(0), TRUE, "ba", 1), PairComparison(pair(0), KIND, "ab", 1),
        PairComparison(pair(0), KIND, "ba", 2),
    ]  # fmt: skip
    assert len({COMPARISONS[1].seed(3), COMPARISONS[1].seed(4), *(c.seed(3) for c in others)}) == 6


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_choice_asks_each_comparison_once_and_normalises_its_two_letters(form: PromptFormat) -> None:
    engine = Recorder([[-1.0, -3.0], RequestFailure("too long"), [-5.0, -4.0]])
    found = judge(engine, "choice", form).judge(COMPARISONS)
    assert found == [Judgement(sigmoid(2.0)), RequestFailure("too long"), Judgement(sigmoid(-1.0))]
    requests = [
        comparison_request(c.pair.prompt, c.principle.comparison, replies, [EXAMPLE], form)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
    ]
    assert engine.questions == [
        LogprobRequest(r.text, OPTIONS, r.prefill, row=c.pair.id) for c, r in zip(COMPARISONS, requests, strict=True)
    ]


def test_calibration_subtracts_the_mean_log_odds_of_three_content_free_pairs_once_for_each_principle() -> None:
    empty = [[0.0, -1.0], [0.0, -2.0], [-3.0, 0.0], [0.0, -4.0], [0.0, -4.0], [0.0, -1.0]]  # means: 0 and 3
    engine = Recorder([*empty, [0.0, -2.0], [0.0, -2.0], [0.0, -2.0]])
    asked = judge(engine, "choice", calibrate=True)
    values = [a.p_first for a in asked.judge(COMPARISONS) if isinstance(a, Judgement)]
    assert values == pytest.approx([sigmoid(2.0), sigmoid(2.0), sigmoid(-1.0)])
    blanks = [
        comparison_request([user("N/A")], p.comparison, (free, free), [EXAMPLE], "chat")
        for p in (KIND, TRUE)
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


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_rationales_are_generated_by_seed_and_answered_in_their_own_comparison(form: PromptFormat) -> None:
    replies = [
        Completion(" left is kinder \n", "stop"),
        RequestFailure("filtered"),
        Completion("\tright is truer", "length"),
    ]
    engine = Recorder([[-1.0, -2.0], [-4.0, -1.0]], replies)
    found = judge(engine, "cot", form).judge(COMPARISONS)
    assert found == [Judgement(sigmoid(1.0), "left is kinder"), RequestFailure("filtered"), Judgement(sigmoid(-3.0), "right is truer")]  # fmt: skip
    requests = [
        rationale_request(c.pair.prompt, c.principle.comparison, replies, [EXAMPLE], form)
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


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_verdict_is_one_or_zero_or_a_failure_of_its_own_comparison(form: PromptFormat) -> None:
    engine = Recorder(
        replies=[Completion("(B)", "stop"), RequestFailure("filtered"), Completion("The answer is: (A)", "stop")]
    )
    found = judge(engine, "verdict", form).judge(COMPARISONS)
    assert found == [Judgement(0.0), RequestFailure("filtered"), Judgement(1.0)]
    requests = [
        verdict_request(c.pair.prompt, c.principle.comparison, replies, [EXAMPLE], form)
        for c, replies in zip(COMPARISONS, ORDERED_REPLIES, strict=True)
    ]
    assert engine.asks == [
        GenerationRequest(r.text, c.seed(3), r.prefill, r.stop, row=c.pair.id)
        for c, r in zip(COMPARISONS, requests, strict=True)
    ]
    assert engine.samplings == [SAMPLING]
    engine = Recorder(replies=[Completion("both", "stop")])
    assert judge(engine, "verdict", form).judge(COMPARISONS[:1]) == [RequestFailure("no verdict in the answer")]


@pytest.mark.parametrize("method", [m for m in Method if m != "verdict"])
def test_an_engine_that_answers_too_few_is_an_error_and_shifts_no_vote(method: str) -> None:
    engine = Recorder([[-1.0, -2.0]], [Completion("a", "stop")])
    with pytest.raises(ValueError, match="shorter"):
        judge(engine, method).judge(COMPARISONS)


def test_a_clamp_bounds_probabilities_and_keeps_rationales_and_failures() -> None:
    engine = Recorder(
        [[0.0, -50.0], [-50.0, 0.0]], [Completion("a", "stop"), Completion("b", "stop"), RequestFailure("no")]
    )
    asked = Judge(engine, "cot", [], "chat", 0, SAMPLING, clamp=(0.4, 0.6))
    assert asked.judge(COMPARISONS) == [Judgement(0.6, "a"), Judgement(0.4, "b"), RequestFailure("no")]


def test_the_share_of_two_options_is_exact_and_never_overflows() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75, abs=1e-15)
    assert (sigmoid(-1e9), sigmoid(1e9)) == (pytest.approx(0.0, abs=1e-300), 1.0)
    assert sigmoid(-700.0) > 0


def test_every_judging_method_is_registered() -> None:
    assert set(METHODS) == set(Method)
