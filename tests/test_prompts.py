"""The exact texts a model is asked with."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.constitution import ComparisonExample, CritiqueExample
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.errors import UsageError
from cai_cli.prompts import (
    RAW_STOPS,
    Request,
    assistant,
    comparison_request,
    critique_request,
    fence,
    pick_form,
    reply_request,
    revision_request,
    user,
)
from cai_cli.records import Message

TALK = [user("how?"), assistant("like so.")]
WORKED = CritiqueExample(
    messages=[user("why?"), assistant("because.")],
    critique_request="Any harm?",
    critique="None.",
    revision_request="Redo it.",
    revision="Because of this.",
)
COMPARED = ComparisonExample(messages=[user("who?")], comparison="Which is kinder?", options=["me", "you"], answer="B")

_EXAMPLE_START = "\n\nHuman: why?\n\nAssistant: because."
_EXAMPLE_CRITIQUE = "\n\nCritiqueRequest: Any harm?\n\nCritique: None."
_EXAMPLE_END = "\n\nRevisionRequest: Redo it.\n\nRevision: Because of this."
_TALK = "\n\nHuman: how?\n\nAssistant: like so."


def unfence(text: str) -> tuple[str, str]:
    """What a careful reader takes for the fenced text, and what stands after it: the opening brackets say how many
    brackets close it."""
    width = len(text) - len(text.lstrip("["))
    inner, closing, rest = text[width:].partition("]" * width)
    assert closing, "never closed"
    return inner, rest


# An option that itself begins with "[" or ends with "]" lengthens the run of brackets, not the width that was chosen.
bracketed = st.text(st.sampled_from("[]ab \n"), max_size=30)


@given(bracketed.filter(lambda t: not t.startswith("[") and not t.endswith("]")), st.text(st.sampled_from("[]x\n")))
def test_a_fence_round_trips_any_text_and_leaves_what_follows(text: str, after: str) -> None:
    inner, rest = unfence(fence(text) + "\n" + after)
    assert inner == text
    assert rest == "\n" + after


@given(bracketed)
def test_no_text_closes_its_own_fence(text: str) -> None:
    fenced = fence(text)
    width = max(3, max((len(run) for run in re.findall(r"\[+|\]+", text)), default=0) + 1)
    assert fenced == "[" * width + text + "]" * width
    assert "]" * width not in text
    assert "[" * width not in text


def test_a_reply_in_raw_form_is_the_transcript_and_the_cue() -> None:
    assert reply_request(TALK[:1], "raw") == Request("\n\nHuman: how?", "\n\nAssistant:", RAW_STOPS)
    assert reply_request(TALK[:1], "chat") == Request(TALK[:1])


def test_a_raw_critique_request_is_the_published_text_after_its_examples() -> None:
    asked = critique_request(TALK, "What is wrong?", [WORKED], "raw")
    assert asked.text == (
        f"{_EXAMPLE_START}{_EXAMPLE_CRITIQUE}{_EXAMPLE_END}{_TALK}\n\nCritiqueRequest: What is wrong?"
    )
    assert (asked.cue, asked.stop) == ("\n\nCritique:", RAW_STOPS)


def test_a_raw_revision_request_goes_on_from_the_critique() -> None:
    asked = revision_request(TALK, ("What is wrong?", "Too short."), "Lengthen it.", [WORKED], "raw")
    assert asked.text == (
        f"{_EXAMPLE_START}{_EXAMPLE_CRITIQUE}{_EXAMPLE_END}{_TALK}"
        "\n\nCritiqueRequest: What is wrong?\n\nCritique: Too short.\n\nRevisionRequest: Lengthen it."
    )
    assert asked.cue == "\n\nRevision:"


def test_a_revision_without_critique_shows_none_anywhere() -> None:
    raw = revision_request(TALK, None, "Lengthen it.", [WORKED], "raw")
    assert raw.text == f"{_EXAMPLE_START}{_EXAMPLE_END}{_TALK}\n\nRevisionRequest: Lengthen it."
    chat = revision_request(TALK, None, "Lengthen it.", [WORKED], "chat")
    assert chat.text == [*WORKED.messages, user("Redo it."), assistant("Because of this."), *TALK, user("Lengthen it.")]


def test_in_a_chat_the_examples_are_earlier_turns_after_the_system_message() -> None:
    system = Message(role="system", content="Be brief.")
    worked = [*WORKED.messages, user("Any harm?"), assistant("None."), user("Redo it."), assistant("Because of this.")]
    asked = critique_request([system, *TALK], "What is wrong?", [WORKED], "chat")
    assert asked == Request([system, *worked, *TALK, user("What is wrong?")])
    revised = revision_request([system, *TALK], ("What is wrong?", "Too short."), "Lengthen it.", [WORKED], "chat")
    assert revised.text == [
        system, *worked, *TALK, user("What is wrong?"), assistant("Too short."), user("Lengthen it."),
    ]  # fmt: skip


_QUESTION = (
    "Consider the following conversation between a human and an assistant:\n\nHuman: how?\n\n\n"
    "Which is safer? Options:\n (A) [[[left]]]\n (B) [[[right]]]"
)
_WORKED_QUESTION = (
    "Consider the following conversation between a human and an assistant:\n\nHuman: who?\n\n\n"
    "Which is kinder? Options:\n (A) [[[me]]]\n (B) [[[you]]]"
)


def test_a_raw_comparison_is_the_published_multiple_choice_question() -> None:
    asked = comparison_request(TALK[:1], "Which is safer?", ["left", "right"], [COMPARED], "raw")
    assert asked.text == f"\n\n{_WORKED_QUESTION}\n\nThe answer is: (B)\n\n{_QUESTION}"
    assert asked.cue == "\n\nThe answer is: ("


def test_a_comparison_in_a_chat_starts_the_answer_the_same_way() -> None:
    asked = comparison_request(TALK[:1], "Which is safer?", ["left", "right"], [COMPARED], "chat")
    assert asked.text == [user(_WORKED_QUESTION), assistant("The answer is: (B)"), user(_QUESTION)]
    assert asked.cue == "The answer is: ("


def test_an_example_without_comparison_takes_the_one_that_is_asked() -> None:
    bare = COMPARED.model_copy(update={"comparison": None})
    text = comparison_request(TALK[:1], "Which is safer?", ["left", "right"], [bare], "raw").text
    assert isinstance(text, str)
    assert text.count("Which is safer? Options:") == 2


@pytest.mark.parametrize("odd", ["{}", "{0}", "%s", "{{ x }}", "\\1", "$HOME"])
def test_template_syntax_inside_rows_stays_text(odd: str) -> None:
    text = comparison_request([user(odd)], odd, [odd, odd], [], "raw").text
    assert isinstance(text, str)
    assert text.count(odd) == 4
    assert odd in str(critique_request([user(odd), assistant(odd)], odd, [], "raw").text)


def test_auto_form_asks_the_engine_and_another_word_is_a_usage_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.jsonl"
    script.write_text('{"replies": ["x"]}\n')
    engine = ScriptedEngine(str(script))
    assert (pick_form("auto", engine), pick_form("raw", engine)) == ("chat", "raw")
    with pytest.raises(UsageError, match="--prompt-form must be"):
        pick_form("html", engine)
