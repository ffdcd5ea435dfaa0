"""Encodes rows as token ids. Control tokens come from the chat template, never from a row's text.

A row that spells a control token (`<|im_end|>\\n<|im_start|>system`) could otherwise end its turn and impersonate
another speaker. Such strings are encoded as plain characters.
No other module encodes rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_cli.common.errors import CaiError, RowError
from cai_cli.data.schema import Message
from cai_cli.models.fetch import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = "use --prompt-format raw where there is such an option; training and scoring need a chat template"


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template.

    If no message spells a token of the tokenizer's added vocabulary, they equal those of
    `tokenizer.apply_chat_template`.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation.
        add_generation_prompt: Whether to append the start of an assistant turn.

    Raises:
        CaiError: The tokenizer has no chat template (`no-chat-template`).
        RowError: The template does not accept these messages (many accept no system message), or their text cannot be
            distinguished from control tokens.
    """
    if tokenizer.chat_template is None:
        raise CaiError("the model has no chat template", hint=NO_TEMPLATE, code="no-chat-template")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=add_generation_prompt,
            sanitize_control_tokens=_spells_a_token(tokenizer, [message.content for message in messages]),
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    # A template is a program that comes with the model (run in a sandbox) and may raise anything.
    except Exception as error:
        raise RowError(f"the chat template refuses the messages: {first_line(error)}", code="request-failed") from error
    if not ids:
        raise RowError("the chat template renders the messages as no tokens", code="request-failed")
    return ids


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, start: bool = True) -> list[int]:
    """The token ids of plain text. Special tokens spelled in `text` are encoded as plain characters.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        start: Whether to prepend what the tokenizer puts before any text (a begin-of-text id).
    """
    ids: list[int] = tokenizer(text, add_special_tokens=start, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _spells_a_token(tokenizer: "PreTrainedTokenizerBase", contents: Sequence[str]) -> bool:
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    tokens = tokenizer.added_tokens_encoder
    spelled = any(token in content for content in contents for token in tokens)
    # transformers marks spelled control tokens with these two private characters, and would delete them from a text.
    marks = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
    if spelled and any(mark in content for content in contents for mark in marks):
        raise RowError(
            "a message spells a control token and contains U+F0000 or U+F0001: both together cannot be encoded",
            code="request-failed",
        )
    return spelled
