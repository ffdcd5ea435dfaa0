"""Loops are found in any script, and structure that repeats is left alone."""

import pytest
from revision_texts import UNSPACED_SENTENCES, loops

from cai_cli.phase1_supervised.repetition import repeated_text

SENTENCES = ["I hope this helps you.", "I'm not sure how to insert punctuation-", *UNSPACED_SENTENCES]


@pytest.mark.parametrize("text", [loop for sentence in SENTENCES for loop in loops(sentence)])
def test_a_loop_is_found_whatever_its_script_and_its_line_breaks(text: str) -> None:
    assert repeated_text(text)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("Stop. " + "I cannot help you with it. " * 3, "I cannot help you with it."),
        ("道路在这里。" * 40, "道路在这里。"),
        ("no " * 20, "no"),
        ("!" * 300, "!!!"),
        ("a b " * 120, "a b"),
        ("one two three four five six seven eight nine ten eleven twelve " * 5, "one two three four five six seven eight nine ten eleven twe…"),
    ],
)  # fmt: skip
def test_the_repeated_text_is_named_from_the_start_of_a_sentence(text: str, repeated: str) -> None:
    assert repeated_text(text) == repeated


def test_a_sentence_that_comes_back_between_others_is_a_loop_where_it_covers_half_of_the_prose() -> None:
    returning = "I think that you should talk to someone you trust about it"
    others = ["Really.", "Be brave.", "It helps.", "Do it now."]
    assert repeated_text(" ".join(f"{returning}. {other}" for other in others)) is not None
    others = [f"There are {n} other things that matter here, and each of them takes time." for n in ("two", "six")]
    assert repeated_text(" ".join(f"{returning}. {other}" for other in others)) is None


@pytest.mark.parametrize("repetitions", [7, 8])
def test_a_line_may_stand_seven_times_in_a_row(repetitions: int) -> None:
    text = "\n".join(["We walk home in the rain"] * repetitions)
    assert (repeated_text(text) is not None) == (repetitions == 8)


@pytest.mark.parametrize("lines", [19, 20])
def test_a_numbered_list_may_have_nineteen_lines_that_differ_in_their_number_only(lines: int) -> None:
    text = "\n".join(f"{n}. Walk for thirty minutes." for n in range(1, lines + 1))
    assert (repeated_text(text) is not None) == (lines == 20)
