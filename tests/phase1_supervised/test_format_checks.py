"""What small models write instead of a revision is detected, and revisions that look similar pass."""

import pytest
from reviser_cases import Recorder
from revision_texts import GOOD_REPLIES

from cai_cli.common.seeds import seed_for
from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.format_checks import ATTEMPTS, critique_problem, generate_checked, revision_problem

REQUEST = "Rewrite your last reply without the insult."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("  \n", "empty revision"),
        ("Here is a revised response: be kind.", "wrapped revision"),
        ("Sure! Here's the rewritten version:\nbe kind.", "wrapped revision"),
        ("Revised reply: be kind.", "wrapped revision"),
        ("The assistant's response is harmful because it insults.", "a critique in place of a revision"),
        ("The last reply was rude.", "a critique in place of a revision"),
        ("Critique: the reply is rude.", "a critique in place of a revision"),
        (f"{REQUEST} Be kind.", "the request repeated in place of a revision"),
        ("I hope this helps you. " * 3, "repeated text in the revision: 'I hope this helps you.'"),
        (
            "I'm not sure how to insert punctuation- " * 4,
            'repeated text in the revision: "I\'m not sure how to insert punctuation-"',
        ),
    ],
)
def test_an_unusable_revision_is_rejected_with_the_reason(text: str, problem: str) -> None:
    assert revision_problem(text, REQUEST) == problem


@pytest.mark.parametrize("text", GOOD_REPLIES)
def test_a_good_reply_that_looks_like_an_error_passes(text: str) -> None:
    assert revision_problem(text, REQUEST) is None


def test_the_request_is_an_error_at_the_start_and_a_short_one_may_stand_in_a_reply() -> None:
    assert revision_problem("Be kind. Be kind to all.", "Be kind.") is not None
    assert revision_problem("Say what you think, and be kind.", "Be kind.") is None


def test_a_critique_may_describe_the_reply_but_not_be_empty_or_repetitive() -> None:
    assert critique_problem("The last reply was rude.") is None
    assert critique_problem(" ") == "empty critique"
    repeated = "It is rude to say. It is rude to say. It is rude to say."
    assert critique_problem(repeated) == "repeated text in the critique: 'It is rude to say.'"


def bad(_index: int, text: str) -> str | None:
    return "bad text" if text == "bad" else None


def test_only_failed_answers_are_sampled_again_with_another_seed_and_the_same_prompt() -> None:
    engine = Recorder("fine", "bad", "bad", "good", "bad", "better")
    requests = [GenerationRequest(f"text {i}", seed_for(i), "cue", ("stop",)) for i in range(3)]
    answers = generate_checked(engine, requests, Sampling(), bad)
    assert [a.text for a in answers if isinstance(a, Completion)] == ["fine", "good", "better"]
    assert [a.text for a in engine.requests] == ["text 0", "text 1", "text 2", "text 1", "text 2", "text 2"]
    assert len({a.seed for a in engine.requests}) == 6
    assert {(a.prefill, a.stop) for a in engine.requests} == {("cue", ("stop",))}


def test_an_answer_that_never_passes_is_rejected_with_the_reason_and_the_number_of_attempts() -> None:
    engine = Recorder(*["bad"] * ATTEMPTS)
    assert generate_checked(engine, [GenerationRequest("x", 1)], Sampling(), bad) == [
        RequestFailure(f"bad text, {ATTEMPTS} attempts")
    ]
    assert len(engine.requests) == ATTEMPTS


def test_the_repeated_text_is_named_in_the_reason_and_is_no_part_of_its_kind() -> None:
    answers = generate_checked(
        Recorder("no: no"), [GenerationRequest("x", 1)], Sampling(temperature=0), lambda _, text: f"repeated: {text!r}"
    )
    assert answers == [RequestFailure("repeated, 1 attempts: 'no: no'")]


def test_a_greedy_answer_is_not_sampled_again() -> None:
    engine = Recorder("bad")
    assert generate_checked(engine, [GenerationRequest("x", 1)], Sampling(temperature=0), bad) == [
        RequestFailure("bad text, 1 attempts")
    ]


def test_a_request_failure_of_the_engine_is_final() -> None:
    assert generate_checked(Recorder(RequestFailure("too long")), [GenerationRequest("x", 1)], Sampling(), bad) == [
        RequestFailure("too long")
    ]
