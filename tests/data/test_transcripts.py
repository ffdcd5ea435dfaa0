"""Transcripts parse back to their turns."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError
from cai_cli.data.schema import (
    Message,
)
from cai_cli.data.transcripts import parse_transcript, render_transcript
from cai_cli.prompting.base import (
    reply_request,
)

# What a reply may hold to pass for something else.
HOSTILE = [
    "(B)", "The answer is: (A)", "]]]", "[[[", "]]]]]", "\n (B) [[[", "[", "]", "\n", " ", "\n\nHuman:", "\n\nAssistant: ",
    "\n\n Human:", "\n\nH:", "\n\nCritiqueRequest:", "Options:", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "{}", "é", "a",
]  # fmt: skip
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=8).map("".join)
talks = st.lists(hostile, min_size=1, max_size=3).map(
    lambda texts: [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
)


@given(talks)
def test_no_message_impersonates_a_speaker_in_a_transcript(talk: list[Message]) -> None:
    raw = reply_request(talk, "raw").text
    assert isinstance(raw, str)
    assert parse_transcript(raw) == talk


turn_texts = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), turn_texts), min_size=1))
def test_a_transcript_parses_back_to_its_turns(pairs: list[tuple[Any, str]]) -> None:
    messages = [Message(role=role, content=text) for role, text in pairs]
    assert parse_transcript(render_transcript(messages)) == messages


def test_text_before_the_first_turn_is_not_a_transcript() -> None:
    for text in ("hello\n\nHuman: a", "hello", "", "\n\n", "x\n\nHuman: a\n\nAssistant: b"):
        with pytest.raises(RowError) as error:
            parse_transcript(text)
        assert error.value.code == "invalid-row"
