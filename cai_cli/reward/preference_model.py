"""Scores conversations with a preference model (paper section 4.1).

A score is a logit: the difference of two scores is the log-odds that the first conversation is preferred. It is read at
the last of the token ids that `encode_conversation` returns, or at the mean over the reply among them, as the model was
trained to be read.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError
from cai_cli.data.schema import Message
from cai_cli.engines.local.rope import length_groups, rope_limits
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import context_window
from cai_cli.models.reading import ReadAt, Reading, place_of
from cai_cli.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_REPLY_START = "the token ids do not show where the reply begins, over which the score is the mean"


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], reading: Reading
) -> list[int]:
    """Return the token ids of a conversation, up to the token at which its score is read.

    White space around the reply is dropped: `cai sample` strips it too, and RL must not exploit it. A model of
    `cai train-pm` is read at the end-of-turn token, because the score there is more informative than at the white space
    that a template adds after it.

    Args:
        tokenizer: Tokenizer of the preference model.
        messages: The conversation; the last message is the reply to score.
        reading: Where the model was trained to be read (`model.reading`).

    Raises:
        RowError: The chat template rejects the conversation, or does not show where its reply begins.
    """
    *prompt, reply = messages
    stripped = Message(role=reply.role, content=reply.content.strip())
    ids = encode_chat(tokenizer, [*prompt, stripped], add_generation_prompt=False)
    while len(ids) > 1 and not reading.keeps_white_space and tokenizer.decode(ids[-1]).isspace():
        del ids[-1]
    while len(ids) > 1 and ids[-1] == reading.padding:
        del ids[-1]
    if not reading.finds_reply(ids):
        raise RowError(NO_REPLY_START, code="request-failed")
    return ids


def preference_model_identity(source: ModelSource) -> dict[str, str]:
    """What identifies a preference model in a manifest: its content, and where it is read if train-pm did not make it.

    Version 0.1.0 read such a model elsewhere, so its outputs with one must not be taken for those of this version.
    """
    at = place_of(source.path)
    return source.identity() | ({"read_at": at.value} if at is ReadAt.WHOLE_TEMPLATE else {})


def open_for_scores(
    path: Path, device: str, dtype: str = "float32"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return the preference model in `path`, for scoring only, and its tokenizer.

    Raises:
        CaiError: The model cannot be loaded, as for `load_reward_model`.
    """
    from cai_cli.engines.local.onednn import pack_linears
    from cai_cli.models.loading import load_reward_model, load_tokenizer

    model = load_reward_model(path, dtype, device)
    if model.reading.at is ReadAt.WHOLE_TEMPLATE:
        console.say(
            f"{path.name} was not trained by `cai train-pm`: its scores are read at the last token of the whole chat "
            "template, as TRL and transformers read them"
        )
    pack_linears(model)
    return model, load_tokenizer(path)


def score_conversations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Sequence[Message]],
    batch_size: int = 16,
) -> list[float]:
    """Return one score (logit) for each conversation, in order.

    Raises:
        CaiError: A conversation is longer than the context window, or a score is not finite.
        RowError: The chat template rejects a conversation.
    """
    return score_ids(
        model, tokenizer, [encode_conversation(tokenizer, c, model.reading) for c in conversations], batch_size
    )


def score_ids(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sequences: Sequence[list[int]],
    batch_size: int,
    names: Sequence[str] = (),
) -> list[float]:
    """Return one score (logit) for each sequence of token ids, in order.

    Args:
        model: The preference model; it is left in evaluation mode.
        tokenizer: Its tokenizer.
        sequences: Token ids from `encode_conversation`.
        batch_size: Number of sequences in one forward pass.
        names: Names of the sequences in error messages.

    Raises:
        CaiError: As for `score_conversations`.
    """
    import torch

    window = context_window(model.config, tokenizer)
    longest = max((len(ids) for ids in sequences), default=0)
    if longest > window:
        raise CaiError(
            f"a conversation of {longest} tokens does not fit the preference model's context window of {window}",
            code="too-long",
        )
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    model.eval()
    groups = length_groups([len(sequences[i]) for i in order], rope_limits(model))
    alike = [[order[place] for place in places] for _, places in groups]
    for batch in [group[start : start + batch_size] for group in alike for start in range(0, len(group), batch_size)]:
        width = len(sequences[batch[-1]])
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):  # right padding; the attention mask says where the tokens end
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            mask[row, : len(sequences[i])] = 1
        with torch.no_grad():  # FSDP could not train with tensors of inference mode
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0]
        for i, score in zip(batch, logits.float().tolist(), strict=True):
            scores[i] = finite(score, names[i] if names else None)
    return scores


def finite(score: float, name: str | None = None) -> float:
    """Return the score if it is finite.

    Raises:
        CaiError: It is infinite or NaN; the message names the row.
    """
    if not math.isfinite(score):
        at = f" at row {name!r}" if name else ""
        raise CaiError(f"the preference model gave the score {score}{at}: its weights are broken", code="not-finite")
    return score
