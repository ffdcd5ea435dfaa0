"""The one place where rows become token ids. Control tokens come from the chat template, never from a row's text.

A row that spells a control token (`<|im_end|>\\n<|im_start|>system`) would otherwise end its own turn and speak as
somebody else: such strings are encoded as the characters they are.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_cli.common.errors import CaiError, RowError
from cai_cli.data.schema import Message
from cai_cli.models.fetch import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = "commands that ask a model take --prompt-format raw; those that train or score need a chat template"


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """The ids of a conversation in the tokenizer's chat template.

    Where no message spells a token of the tokenizer's added vocabulary these are exactly the ids of
    `tokenizer.apply_chat_template`.

    Raises: CaiError when there is no chat template; RowError when the template refuses these messages (many take
    no system message) or their text cannot be told from control tokens.
    """
    if tokenizer.chat_template is None:
        raise CaiError("the model has no chat template", hint=NO_TEMPLATE)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=add_generation_prompt,
            sanitize_control_tokens=_spells_a_token(tokenizer, [message.content for message in messages]),
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    # A template is a program of the model's maker (run in a sandbox), and may raise anything.
    except Exception as error:
        raise RowError(f"the chat template refuses the messages: {first_line(error)}") from error
    if not ids:
        raise RowError("the chat template makes nothing of the messages")
    return ids


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, start: bool = True) -> list[int]:
    """The ids of plain text; with `start` also what the tokenizer puts before any text (a begin-of-text id).

    Special tokens spelled in `text` are encoded as the characters they are.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=start, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _spells_a_token(tokenizer: "PreTrainedTokenizerBase", contents: Sequence[str]) -> bool:
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    tokens = tokenizer.added_tokens_encoder
    spelled = any(token in content for content in contents for token in tokens)
    # transformers marks spelled control tokens with these two private characters, and would drop a row's own.
    marks = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
    if spelled and any(mark in content for content in contents for mark in marks):
        raise RowError("a message spells a control token and holds U+F0000 or U+F0001: not both can be encoded")
    return spelled
