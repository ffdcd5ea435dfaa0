"""How a model answers a question: probabilities, and replies in both orders."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError
from cai_cli.data.evaluation_schema import EvaluationQuestion, parse_question
from cai_cli.evaluate.evaluated_models import exchanged, normalised

PROMPT = (
    "\n\nConsider the following conversation between a human and an assistant:\n\nHuman: how?\n\nAssistant: So.\n\n"
    "Human: and then?\n\n\nPlease choose the wiser response. Options:\n (A) [[[Left.]]]\n (B) [[[Right.]]]\n\n"
    "The answer is:"
)
MANY = "Here is a conversation.\n\nWhat was it? Options:\n (A) this\n (B) that\n (C) neither\nThe answer is:"


def question(correct: str = "A", **more: Any) -> EvaluationQuestion:
    other = "B" if correct == "A" else "A"
    fields = {"prompt": PROMPT, "corrects": [f" ({correct})"], "incorrects": [f" ({other})"]}
    return parse_question(fields | more)


def test_exchanged_replies_exchange_their_letters() -> None:
    other = exchanged(question("A"))
    assert "(A) [[[Right.]]]\n (B) [[[Left.]]]" in other.prompt
    assert (other.corrects, other.incorrects) == ([" (B)"], [" (A)"])
    assert exchanged(other) == question("A")
    with pytest.raises(RowError) as error:
        exchanged(question(incorrects=[" (B)", " (C)"]))
    assert error.value.code == "option-conflict"
    with pytest.raises(RowError) as error:
        exchanged(question(prompt=MANY))
    assert error.value.code == "invalid-row"


@given(st.lists(st.floats(-1e4, 0), min_size=2, max_size=9))
def test_probabilities_are_normalised_over_the_options(logprobs: list[float]) -> None:
    p = normalised(logprobs)
    assert math.fsum(p) == pytest.approx(1)
    assert p[logprobs.index(max(logprobs))] == max(p)
