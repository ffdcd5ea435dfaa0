"""The checks take time in proportion to the length of a text, whatever it holds.

Each text here has 100,000 characters. Where time grows with the square of the length, one of them takes minutes
and the time limit of the tests ends it.
"""

import random

import pytest

from cai_cli.phase1_supervised.format_checks import critique_problem, revision_problem

LENGTH = 100_000
DRAW = random.Random(0)
UNITS = {
    "spaces between two letters": "x" + "\t" * (LENGTH - 2) + "y",
    "empty lines": "\n" * 999 + "x",
    "white space that ends no line": "\n" + " " * 50,
    "lines of punctuation": "\n!",
    "rows of a table": "|---|---|\n",
    "list items without text": "- |\n",
    "code fences": "```\n",
    "indented code fences": "  ```\n",
    "a word without an end": "a",
    "colons and slashes": ":/",
    "runs of one character that are just short enough": "a" * 199 + "b",
    "dots before digits": "." * 500 + "1",
    "stretches that are just short enough": "+ " * 99 + "- ",
    "starts of remarks": "\nnote***",
    "starts of wrappers": ". here is the a b c revised version of the ",
    "null bytes": "\0",
    "right-to-left": "\u202eمرحبا بالعالم ",
    "joined emoji": "👨\u200d👩\u200d👧",
}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_a_hostile_text_is_checked_in_linear_time(unit: str) -> None:
    text = (unit * (LENGTH // len(unit) + 1))[:LENGTH]
    critique_problem(f"See. {text}")
    revision_problem(f"See. {text}", "Rewrite your last reply without the insult.", user_message=text)


@pytest.mark.parametrize("alphabet", ["+-", "ab ", "中文", "01 ", "\n .!`|"])
def test_a_random_text_of_few_characters_is_checked_in_linear_time(alphabet: str) -> None:
    revision_problem("See. " + "".join(DRAW.choices(alphabet, k=LENGTH)), "Rewrite your last reply.")


def test_a_loop_of_ten_characters_without_spaces_counts_as_six_words() -> None:
    """Word counts are exact: ten characters of 0.6 words each are six words, not a little less."""
    from cai_cli.phase1_supervised.repetition import repeated_text

    others = ["真的。", "勇敢。", "可以。", "现在。"]
    text = "".join(f"我们应该一起走路回家。{other}" for other in others)
    assert repeated_text(text) == "我们应该一起走路回家"
