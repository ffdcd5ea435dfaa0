"""Requests for critiques and revisions, word for word."""

from cai_cli.constitution.schema import CritiqueExample
from cai_cli.data.schema import Message
from cai_cli.prompting.base import (
    RAW_STOPS,
    Request,
    assistant,
    user,
)
from cai_cli.prompting.revision import critique_request, revision_request

TALK = [user("how?"), assistant("like so.")]
WORKED = CritiqueExample(
    messages=[user("why?"), assistant("because.")],
    critique_request="Any harm?",
    critique="None.",
    revision_request="Redo it.",
    revision="Because of this.",
)


_EXAMPLE_START = "\n\nHuman: why?\n\nAssistant: because."
_EXAMPLE_CRITIQUE = "\n\nCritiqueRequest: Any harm?\n\nCritique: None."
_EXAMPLE_END = "\n\nRevisionRequest: Redo it.\n\nRevision: Because of this."
_TALK = "\n\nHuman: how?\n\nAssistant: like so."


def test_a_raw_critique_request_is_the_published_text_after_its_examples() -> None:
    request = critique_request(TALK, "What is wrong?", [WORKED], "raw")
    assert request.text == (
        f"{_EXAMPLE_START}{_EXAMPLE_CRITIQUE}{_EXAMPLE_END}{_TALK}\n\nCritiqueRequest: What is wrong?"
    )
    assert (request.prefill, request.stop) == ("\n\nCritique:", RAW_STOPS)


def test_a_raw_revision_request_continues_from_the_critique() -> None:
    request = revision_request(TALK, ("What is wrong?", "Too short."), "Lengthen it.", [WORKED], "raw")
    assert request.text == (
        f"{_EXAMPLE_START}{_EXAMPLE_CRITIQUE}{_EXAMPLE_END}{_TALK}"
        "\n\nCritiqueRequest: What is wrong?\n\nCritique: Too short.\n\nRevisionRequest: Lengthen it."
    )
    assert (request.prefill, request.stop) == ("\n\nRevision:", RAW_STOPS)


def test_examples_follow_each_other_with_nothing_between() -> None:
    whole, short = _EXAMPLE_START + _EXAMPLE_CRITIQUE + _EXAMPLE_END, _EXAMPLE_START + _EXAMPLE_END
    for text, example in (
        (critique_request(TALK, "x", [WORKED] * 2, "raw").text, whole),
        (revision_request(TALK, ("x", "y"), "z", [WORKED] * 2, "raw").text, whole),
        (revision_request(TALK, None, "z", [WORKED] * 2, "raw").text, short),
    ):
        assert isinstance(text, str)
        assert text.startswith(example * 2 + _TALK)


def test_a_revision_without_critique_shows_none_anywhere() -> None:
    raw = revision_request(TALK, None, "Lengthen it.", [WORKED], "raw")
    assert raw.text == f"{_EXAMPLE_START}{_EXAMPLE_END}{_TALK}\n\nRevisionRequest: Lengthen it."
    chat = revision_request(TALK, None, "Lengthen it.", [WORKED], "chat")
    assert chat.text == [*WORKED.messages, user("Redo it."), assistant("Because of this."), *TALK, user("Lengthen it.")]


def test_in_a_chat_the_examples_are_earlier_turns_after_the_system_message() -> None:
    system = Message(role="system", content="Be brief.")
    worked = [*WORKED.messages, user("Any harm?"), assistant("None."), user("Redo it."), assistant("Because of this.")]
    request = critique_request([system, *TALK], "What is wrong?", [WORKED], "chat")
    assert request == Request([system, *worked, *TALK, user("What is wrong?")])
    revised = revision_request([system, *TALK], ("What is wrong?", "Too short."), "Lengthen it.", [WORKED], "chat")
    assert revised.text == [
        system, *worked, *TALK, user("What is wrong?"), assistant("Too short."), user("Lengthen it."),
    ]  # fmt: skip
