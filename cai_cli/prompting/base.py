"""Shared by all prompts: the two prompt formats, `Request`, and the request for the next reply.

No module outside `prompting` builds prompt text. Raw prompts are those published with the paper (for base models). Chat
prompts have the same content in turns, with few-shot examples as earlier turns. Prompts are built by concatenation in
one pass, so braces and template syntax in rows stay text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cai_cli.common.errors import UsageError
from cai_cli.data.schema import Message
from cai_cli.data.transcripts import render_transcript
from cai_cli.engines.base import Engine, Text

PromptFormat = Literal["chat", "raw"]
RAW_STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nRevisionRequest:")


@dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        text: A chat or raw text.
        prefill: The start of the answer, which the model continues.
        stop: Strings that end the answer.
    """

    text: Text
    prefill: str = ""
    stop: tuple[str, ...] = ()


def resolve_prompt_format(prompt_format: str, engine: Engine) -> PromptFormat:
    """The format for `--prompt-format`; "auto" is chat if the model has a chat template, else raw.

    Raises:
        UsageError: `prompt_format` is not "auto", "chat" or "raw"; or prompts are raw and there are options of the chat
            template (`option-conflict`).
    """
    if prompt_format not in ("auto", *get_args(PromptFormat)):
        raise UsageError(f"--prompt-format must be auto, chat or raw, not {prompt_format!r}", code="invalid-option")
    if prompt_format == "chat" or (prompt_format == "auto" and engine.supports_chat()):
        return "chat"
    chat = getattr(engine, "chat", None)  # scripted engines have none
    if chat and (chat.template or chat.recorded()):
        raise UsageError(
            "--thinking, --template-arg and --chat-template have no effect on raw prompts",
            hint="leave them out, or use --prompt-format chat",
            code="option-conflict",
        )
    return "raw"


def user(content: str) -> Message:
    """A user turn."""
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    """An assistant turn."""
    return Message(role="assistant", content=content)


def reply_request(conversation: Sequence[Message], form: PromptFormat) -> Request:
    """The request for the next assistant turn of a conversation."""
    if form == "chat":
        return Request(list(conversation))
    return Request(render_transcript(conversation), prefill="\n\nAssistant:", stop=RAW_STOPS)
