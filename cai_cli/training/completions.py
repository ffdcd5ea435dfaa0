"""Prompts with their replies as token ids, as the trainers of language models take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message
from cai_cli.engines.thoughts import closing_of, unclosed
from cai_cli.engines.tokenization import control_ids, encode_chat, generation_prompt
from cai_cli.prompting.base import assistant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and a reply.

    Attributes:
        ids: The ids of the whole conversation, shape (length,).
        prompt_length: Number of leading ids that belong to the prompt and carry no loss.
    """

    ids: list[int]
    prompt_length: int

    def columns(self) -> dict[str, list[int]]:
        """The row of the training dataset; labels of the prompt are -100."""
        labels = [-100] * self.prompt_length + self.ids[self.prompt_length :]
        return {"input_ids": self.ids, "labels": labels}


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], reply: str, *, close: bool = True
) -> Encoded:
    """Encode a prompt and a reply in the chat template.

    Where the template starts an answer within thoughts, and renders a finished turn without them, the reply follows
    empty thoughts: a model is trained on what it is to write after its prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        reply: The reply.
        close: Whether the end of turn follows the reply.

    Raises:
        RowError: The template cannot render the conversation, or does not render the prompt as its start.
    """
    start = encode_chat(tokenizer, prompt, add_generation_prompt=True)
    ids = encode_chat(tokenizer, [*prompt, assistant(reply)], add_generation_prompt=False, close=close)
    if ids[: len(start)] != start and (opened := unclosed(generation_prompt(tokenizer))):
        ids = _after_empty_thoughts(tokenizer, start, ids, opened)
    if ids[: len(start)] != start:
        raise RowError(
            "the chat template does not render the prompt as the start of the conversation", code="no-chat-template"
        )
    return Encoded(ids, len(start))


def _after_empty_thoughts(
    tokenizer: "PreTrainedTokenizerBase", start: list[int], ids: list[int], opened: str
) -> list[int]:
    """The conversation `ids` with empty thoughts between `start`, which opens them, and the reply; `ids` itself where
    they differ in more than the thoughts."""
    for length in range(1, min(len(start), len(opened)) + 1):
        before = len(start) - length
        if tokenizer.decode(start[before:]).strip() == opened.strip() and ids[:before] == start[:before]:
            return [*start, *control_ids(tokenizer, closing_of(opened)), *ids[before:]]
    return ids
