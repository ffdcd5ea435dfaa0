"""Every text a model is asked with: critique, revision and comparison requests, as chat or as raw text.

Nothing else builds prompt text. The raw forms are those published with the paper (for base models); the chat forms
say the same in turns, the few-shot examples as earlier turns. Substitution is single-pass concatenation: braces and
template syntax inside rows stay text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cai_cli.common.errors import UsageError
from cai_cli.data.formats import render_transcript
from cai_cli.data.schema import Message
from cai_cli.engines.base import Engine, Text

PromptFormat = Literal["chat", "raw"]
RAW_STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nRevisionRequest:")


@dataclass(frozen=True)
class Request:
    """A text to complete, the cue its answer starts with, and the strings that end it."""

    text: Text
    prefill: str = ""
    stop: tuple[str, ...] = ()


def resolve_prompt_format(prompt_format: str, engine: Engine) -> PromptFormat:
    """`--prompt-format` as chat or raw; auto asks whether the model has a chat template. Raises UsageError."""
    if prompt_format == "auto":
        return "chat" if engine.speaks_chat() else "raw"
    if prompt_format not in get_args(PromptFormat):
        raise UsageError(f"--prompt-format must be auto, chat or raw, not {prompt_format!r}")
    return "chat" if prompt_format == "chat" else "raw"


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def reply_request(conversation: Sequence[Message], form: PromptFormat) -> Request:
    """The next assistant turn."""
    if form == "chat":
        return Request(list(conversation))
    return Request(render_transcript(conversation), prefill="\n\nAssistant:", stop=RAW_STOPS)
