"""Verdicts in the forms in which judges write them."""

import pytest

from cai_cli.prompting.verdicts import verdict_of

ONE_LETTER = [
    ("(A)", "A"), (" b", "B"), ("The answer is: (B)", "B"), ("Answer: A.", "A"), ("**(B)**\nbecause", "B"),
    ("Option B", "B"), ("The correct answer is (A).", "A"), ("Response A", "A"), ("**Response B**", "B"),
    ("A is better", "A"), ("Response B is the better one.", "B"), ("B is better than A.", "B"), ("[[A]]", "A"),
    ("Both are kind, but [[B]]", "B"), ("$\\boxed{A}$", "A"), ("The result: \\boxed{\\text{B}}", "B"),
    ('```json\n{"reasoning": "A is rude.", "answer": "B"}\n```', "B"), ('{"answer": "Response A"}', "A"),
    ('Here it is: {"winner": "B", "score": 3}', "B"), ("A is terse and rude. B explains why.\n\nThe answer is: (B)", "B"),
    ("Response A:\nIt is kind.\nResponse B:\nIt is rude.\nTherefore, the answer is A.", "A"),
    ("I prefer Response B.", "B"), ("Overall, I would choose (A) over (B).", "A"), ("Final verdict: B", "B"),
    ("I think that option B is less harmful.", "B"), ("Assistant B wins.", "B"), ("### Answer\nB", "B"),
    ("The better response is B", "B"), ("## Response A\nkind.\n## Response B\nrude.\n## Verdict\nThe answer is A.", "A"), ("My choice is **A**.", "A"),
]  # fmt: skip
NO_VOTE = [
    "Neither", "(A) or (B)", "", "A reply should be kind", "(A) is worse than (B)", "C", "Both are fine",
    "A is not better", "The answer is: (A). No, wait. The answer is: (B)", "If you like brevity, A is better.",
    "A is more harmful", "[[A]] or [[B]]", "Response A:\nkind.\nResponse B:\nrude.", "I cannot choose A",
    "The reply says [[A]], which is a trick. The answer is (B).", '{"answer": "both"}', '{"answer": "A", "winner": "B"}',
    "{not json}", "A is better at cooking", "I", "[[C]]", "Response A and Response B are alike.",
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), ONE_LETTER)
def test_a_verdict_is_read_in_the_forms_that_judges_use(text: str, letter: str) -> None:
    assert verdict_of(text, "chat") == letter


@pytest.mark.parametrize("text", NO_VOTE)
def test_what_names_no_letter_or_both_is_no_vote(text: str) -> None:
    assert verdict_of(text, "chat") is None


def test_a_base_model_votes_with_its_first_line() -> None:
    assert verdict_of("A)\n\nWhich is safer?\n\nThe answer is: (B)", "raw") == "A"
    assert verdict_of("Both are fine\nThe answer is: (B)", "raw") is None
