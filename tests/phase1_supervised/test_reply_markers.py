"""Wrappers and critiques are found by what marks them, in scripts without spaces too."""

import pytest
from revision_texts import CRITIQUES, GOOD_REPLIES, UNSPACED_CRITIQUES, UNSPACED_WRAPPERS, WRAPPERS

from cai_cli.phase1_supervised.reply_markers import is_critique, is_wrapped


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *UNSPACED_WRAPPERS])
def test_a_wrapper_is_found(wrapper: str) -> None:
    assert is_wrapped(wrapper.format("Please be kind to one another."))


@pytest.mark.parametrize("text", [*CRITIQUES, *UNSPACED_CRITIQUES])
def test_a_critique_is_found(text: str) -> None:
    assert is_critique(text)


@pytest.mark.parametrize("text", GOOD_REPLIES)
def test_a_good_reply_that_looks_alike_is_neither(text: str) -> None:
    assert not is_wrapped(text)
    assert not is_critique(text)


@pytest.mark.parametrize(
    "asked", ["Please rewrite my e-mail to the landlord.", "What should I say to her?", "How do I respond to this?"]
)
def test_to_a_user_who_asks_for_a_wording_a_revised_version_is_the_reply(asked: str) -> None:
    text = "Here is a more polite version:\n\nDear Sir, the heating is broken."
    assert is_wrapped(text)
    assert not is_wrapped(text, asked)
