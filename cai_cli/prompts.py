"""Every text a model is asked with: critique, revision and comparison requests, as chat or as raw text.

Nothing else builds prompt text. The raw forms are those published with the paper (for base models); the chat forms
say the same in turns, the few-shot examples as earlier turns. Substitution is single-pass concatenation: braces and
template syntax inside rows stay text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cai_cli.constitution import ComparisonExample, CritiqueExample
from cai_cli.engines.base import Engine, Text
from cai_cli.errors import UsageError
from cai_cli.records import Message, render_transcript

Form = Literal["chat", "raw"]
RAW_STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nRevisionRequest:")
OPTIONS = ("A", "B")


@dataclass(frozen=True)
class Request:
    """A text to complete, the cue its answer starts with, and the strings that end it."""

    text: Text
    cue: str = ""
    stop: tuple[str, ...] = ()


def pick_form(prompt_form: str, engine: Engine) -> Form:
    """`--prompt-form` as chat or raw; auto asks whether the model has a chat template. Raises UsageError."""
    if prompt_form == "auto":
        return "chat" if engine.speaks_chat() else "raw"
    if prompt_form not in get_args(Form):
        raise UsageError(f"--prompt-form must be auto, chat or raw, not {prompt_form!r}")
    return "chat" if prompt_form == "chat" else "raw"


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def reply_request(conversation: Sequence[Message], form: Form) -> Request:
    """The next assistant turn."""
    if form == "chat":
        return Request(list(conversation))
    return Request(render_transcript(conversation), cue="\n\nAssistant:", stop=RAW_STOPS)


# --- critique and revision, paper section 3.1 ---------------------------------------------------------------------


def critique_request(
    conversation: Sequence[Message], request: str, examples: Sequence[CritiqueExample], form: Form
) -> Request:
    """Ask for a critique of the last assistant turn of `conversation`."""
    if form == "chat":
        return Request([*_with_examples(conversation, examples), user(request)])
    text = "".join(_raw_example(e) for e in examples) + render_transcript(conversation)
    return Request(f"{text}\n\nCritiqueRequest: {request}", cue="\n\nCritique:", stop=RAW_STOPS)


def revision_request(
    conversation: Sequence[Message],
    critique: tuple[str, str] | None,
    request: str,
    examples: Sequence[CritiqueExample],
    form: Form,
) -> Request:
    """Ask for a revision of the last assistant turn; `critique` is (its request, its text), or None to revise
    directly (paper section 3.5)."""
    if form == "chat":
        between = [user(critique[0]), assistant(critique[1])] if critique else []
        earlier = _with_examples(conversation, examples, with_critique=critique is not None)
        return Request([*earlier, *between, user(request)])
    text = "".join(_raw_example(e, with_critique=critique is not None) for e in examples)
    text += render_transcript(conversation)
    if critique:
        text += f"\n\nCritiqueRequest: {critique[0]}\n\nCritique: {critique[1]}"
    return Request(f"{text}\n\nRevisionRequest: {request}", cue="\n\nRevision:", stop=RAW_STOPS)


def _with_examples(
    conversation: Sequence[Message], examples: Sequence[CritiqueExample], with_critique: bool = True
) -> list[Message]:
    system = [m for m in conversation if m.role == "system"]
    turns = [m for m in conversation if m.role != "system"]
    shown: list[Message] = []
    for e in examples:
        shown += e.messages
        if with_critique:
            shown += [user(e.critique_request), assistant(e.critique)]
        shown += [user(e.revision_request), assistant(e.revision)]
    return [*system, *shown, *turns]


def _raw_example(e: CritiqueExample, with_critique: bool = True) -> str:
    text = render_transcript(e.messages)
    if with_critique:
        text += f"\n\nCritiqueRequest: {e.critique_request}\n\nCritique: {e.critique}"
    return f"{text}\n\nRevisionRequest: {e.revision_request}\n\nRevision: {e.revision}"


# --- comparison, paper section 4.1 --------------------------------------------------------------------------------

_PREAMBLE = "Consider the following conversation between a human and an assistant:"


def comparison_request(
    conversation: Sequence[Message],
    comparison: str,
    options: Sequence[str],
    examples: Sequence[ComparisonExample],
    form: Form,
) -> Request:
    """The multiple-choice question; the answer continues with the letter of one of `OPTIONS`."""
    if form == "chat":
        turns: list[Message] = []
        for e in examples:
            turns.append(user(_choice(e.messages, e.comparison or comparison, e.options)))
            turns.append(assistant(f"The answer is: ({e.answer})"))
        return Request([*turns, user(_choice(conversation, comparison, options))], cue="The answer is: (")
    text = "".join(
        f"\n\n{_choice(e.messages, e.comparison or comparison, e.options)}\n\nThe answer is: ({e.answer})"
        for e in examples
    )
    return Request(f"{text}\n\n{_choice(conversation, comparison, options)}", cue="\n\nThe answer is: (")


def _choice(conversation: Sequence[Message], comparison: str, options: Sequence[str]) -> str:
    lettered = "".join(f"\n ({letter}) {fence(text)}" for letter, text in zip(OPTIONS, options, strict=True))
    return f"{_PREAMBLE}{render_transcript(conversation)}\n\n\n{comparison} Options:{lettered}"


def fence(text: str) -> str:
    """`[[[text]]]`, with longer brackets than any run inside, so that no reply can close its own fence."""
    longest = max((len(run) for run in re.findall(r"\[+|\]+", text)), default=0)
    width = max(3, longest + 1)
    return "[" * width + text + "]" * width
