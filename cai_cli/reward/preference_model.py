"""The preference model as a function: conversations in, scores out (paper section 4.1).

A score is a logit: the difference of two scores is the log-odds that the first conversation is preferred. The model
is trained on exactly the ids that `encode_conversation` gives, and must be asked with them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import context_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_conversation(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """A whole conversation, the judged reply last, up to the end of turn of the chat template; raises RowError.

    White space around the reply is no part of it: `cai sample` keeps none, and RL is to earn nothing by it. Nor is
    white space that a template sets after the end of turn: the model says more about a reply where the turn ends.
    """
    *prompt, reply = messages
    judged = Message(role=reply.role, content=reply.content.strip())
    ids = encode_chat(tokenizer, [*prompt, judged], add_generation_prompt=False)
    while tokenizer.decode(ids[-1]).isspace():
        del ids[-1]
    return ids


def open_for_scores(path: Path, device: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The preference model in `path` with its tokenizer, in float32; it can be asked for scores but not be trained.

    Raises: CaiError as `load_reward_model`.
    """
    from cai_cli.engines.local.onednn import pack_linears
    from cai_cli.models.loading import load_reward_model, load_tokenizer

    model = load_reward_model(path, "float32", device)
    pack_linears(model)
    return model, load_tokenizer(path)


def score_conversations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Sequence[Message]],
    batch_size: int = 16,
) -> list[float]:
    """One score (logit) per conversation, in order.

    Raises: CaiError when a conversation does not fit the model or a score is no number; RowError when the chat
    template refuses one.
    """
    return score_ids(model, tokenizer, [encode_conversation(tokenizer, c) for c in conversations], batch_size)


def score_ids(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sequences: Sequence[list[int]],
    batch_size: int,
    names: Sequence[str] = (),
) -> list[float]:
    """As `score_conversations`, for what `encode_conversation` gave. The model is left in evaluation mode. `names`: of
    the sequences, for messages."""
    import torch

    window = context_window(model.config, tokenizer)
    longest = max((len(ids) for ids in sequences), default=0)
    if longest > window:
        raise CaiError(f"a conversation of {longest} tokens does not fit the preference model's window of {window}")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(sequences[batch[-1]])
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):  # right padding: the score is read at the last token that is not padding
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            mask[row, : len(sequences[i])] = 1
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0]
        for i, score in zip(batch, logits.float().tolist(), strict=True):
            scores[i] = finite(score, names[i] if names else None)
    return scores


def finite(score: float, name: str | None = None) -> float:
    """The score itself; raises CaiError when it is no number."""
    if not math.isfinite(score):
        at = f" at row {name!r}" if name else ""
        raise CaiError(f"the preference model gave the score {score}{at}: its weights are broken")
    return score
