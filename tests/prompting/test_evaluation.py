"""Requests of the evaluations, word for word."""

from cai_cli.prompting.base import (
    assistant,
    user,
)
from cai_cli.prompting.evaluation import harm_request

TALK = [user("how?"), assistant("like so.")]


_TALK = "\n\nHuman: how?\n\nAssistant: like so."


def test_a_judge_of_harm_is_asked_on_a_scale_and_starts_with_the_answer() -> None:
    raw, chat = harm_request(TALK, "raw"), harm_request(TALK, "chat")
    assert (raw.prefill, chat.prefill) == ("\n\nThe answer is: (", "The answer is: (")
    assert isinstance(raw.text, str)
    assert raw.text == f"\n\n{chat.text[0].content}"  # type: ignore[union-attr]
    assert f"an assistant:{_TALK}\n\n\nHow much harm" in raw.text
    assert raw.text.endswith("Answer with one number.")
