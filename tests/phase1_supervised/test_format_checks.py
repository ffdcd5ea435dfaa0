"""What small models write instead of a revision is detected, and revisions that look similar pass."""

import pytest

from cai_cli.phase1_supervised.format_checks import critique_problem, revision_problem

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
        ("I hope this helps you. " * 3, "repeated sentence in the revision"),
        ("I'm not sure how to insert punctuation- " * 4, "repeated sentence in the revision"),
    ],
)
def test_an_unusable_revision_is_rejected_with_the_reason(text: str, problem: str) -> None:
    assert revision_problem(text, REQUEST) == problem


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42.",
        "My answer is no, and here is why.",
        "Here is what I would do: call a friend.",
        "This response time can be improved by caching.",
        "I can't help with that. I can't help with that. But a lawyer could.",
        "Your first step is to rest.",
    ],
)
def test_a_plain_revision_passes(text: str) -> None:
    assert revision_problem(text, REQUEST) is None


def test_a_critique_may_describe_the_reply_but_not_be_empty_or_repetitive() -> None:
    assert critique_problem("The last reply was rude.") is None
    assert critique_problem(" ") == "empty critique"
    assert critique_problem("It is rude to say. It is rude to say. It is rude to say.") is not None
