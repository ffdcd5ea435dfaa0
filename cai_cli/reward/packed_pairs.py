"""Scores two replies to one prompt in one forward pass, so that the tokens of the prompt are computed once.

A packed pair consists of the tokens that both conversations share at the start, the rest of the first, and the rest of
the second. A token attends to the shared tokens and to those of its own conversation, at the position it has there, so
the two scores equal those of the conversations alone. On HH-RLHF's harmlessness pairs 62% of the tokens remain.
"""

import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.engines.local.rope import rope_limits
from cai_cli.models.reading import forward_to_place, head_output, hidden_at_place, hidden_states
from cai_cli.reward.preference_model import finite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SHARED, PADDING = 0, -1


def packed(first: Sequence[int], second: Sequence[int]) -> dict[str, list[int]]:
    """Return two conversations as one packed pair.

    Args:
        first: Token ids of the first conversation.
        second: Token ids of the second.

    Returns:
        `input_ids`, `position_ids`, and `branches`: 0 for a shared token, 1 or 2 for one of the first or second.

    Examples:
        >>> pair = packed([1, 2, 3], [1, 2, 4, 5])
        >>> pair["input_ids"], pair["position_ids"], pair["branches"]
        ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2])
    """
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return {
        "input_ids": [*first, *second[shared:]],
        "position_ids": [*range(len(first)), *range(shared, len(second))],
        "branches": [SHARED] * shared + [1] * (len(first) - shared) + [2] * (len(second) - shared),
    }


def collate(pairs: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
    """Return packed pairs as tensors of shape (pairs, longest), padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    fill = {"input_ids": pad_token_id, "position_ids": 0, "branches": PADDING}
    batch = {
        name: pad_sequence([torch.tensor(pair[name]) for pair in pairs], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    return {**batch, "attention_mask": (batch["branches"] != PADDING).long()}


def enable_packed_pairs(model: "PreTrainedModel", longest: tuple[list[int], list[int]]) -> bool:
    """Make a sequence classifier accept packed pairs; other inputs work as before.

    The `logits` of packed pairs have shape (2 * pairs, 1): first all first conversations, then all second ones.

    Args:
        model: The classifier.
        longest: Token ids of the longest pair.

    Returns:
        Whether packing works (`packing_works`); if not, the model is unchanged.
    """
    plain = vars(model).get("forward")
    if not accept_packed_pairs(model, longest):
        return False
    works = packing_works(model, longest)
    if not works:
        del model.forward
        if plain is not None:
            model.forward = plain
    return works


def accept_packed_pairs(model: "PreTrainedModel", longest: tuple[list[int], list[int]]) -> bool:
    """Make a sequence classifier accept packed pairs, where its class can; returns whether it does.

    Whether their scores are right is for `packing_works` to tell.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    limits = rope_limits(model)  # the conversations of a pair may need other positions for the tokens that they share
    if not isinstance(model, GenericForSequenceClassification) or (limits and max(map(len, longest)) > limits[0]):
        return False
    model.forward = types.MethodType(_forward, model)
    return True


def packing_works(model: "PreTrainedModel", longest: tuple[list[int], list[int]]) -> bool:
    """Whether a classifier that accepts packed pairs gives the scores that it gives conversations alone.

    With sliding-window attention or layers without attention it does not.

    Args:
        model: The classifier; it is left in evaluation mode.
        longest: Token ids of the longest pair, which is scored packed and alone.
    """
    import torch

    batch = collate([packed(*longest)], model.config.get_text_config().pad_token_id)
    model.eval()
    with torch.no_grad():
        both = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        alone = torch.cat([model(input_ids=torch.tensor([ids], device=model.device)).logits for ids in longest])
    return torch.allclose(both.float(), alone.float(), atol=1e-3, rtol=1e-3)


def _forward(self: Any, input_ids: Any = None, branches: Any = None, **inputs: Any) -> Any:
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    if branches is None:
        return forward_to_place(self, input_ids, **inputs)
    columns = torch.arange(branches.shape[1], device=branches.device)
    before = columns[:, None] >= columns
    own = branches[:, :, None] == branches[:, None, :]
    visible = before & (own | (branches[:, None, :] == SHARED))
    hidden = hidden_states(self, input_ids, attention_mask=visible[:, None], position_ids=inputs["position_ids"])
    own_tokens = ((branches == SHARED) | (branches == branch) for branch in (1, 2))
    # The reply begins among the shared tokens, because both conversations have the same prompt.
    places = torch.cat([hidden_at_place(self, hidden, input_ids, tokens) for tokens in own_tokens])
    return SequenceClassifierOutput(logits=head_output(self, places))


def head_outputs(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple["Tensor", "Tensor"]:
    """Return the outputs of the head for the first and the second conversation of each pair.

    Args:
        model: A model that accepts packed pairs; it is left in evaluation mode.
        pairs: Token ids of the conversations.
        batch_size: Number of pairs in one forward pass.

    Returns:
        Two tensors of shape (pairs, outputs) on the CPU.
    """
    import torch

    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))
    first, second = [], []
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = collate(
            [packed(*pairs[i]) for i in order[start : start + batch_size]], model.config.get_text_config().pad_token_id
        )
        with torch.no_grad():  # FSDP could not train with tensors of inference mode
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        one, other = logits.float().cpu().chunk(2)
        first.append(one)
        second.append(other)
    back = torch.tensor(order).argsort()
    return torch.cat(first)[back], torch.cat(second)[back]


def score_pairs(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple[list[float], list[float]]:
    """Return the scores (logits) of the first and of the second conversation of each pair.

    Raises:
        CaiError: A score is not finite.
    """
    if not pairs:
        return [], []
    first, second = (scores[:, 0].tolist() for scores in head_outputs(model, pairs, batch_size))
    return [finite(score) for score in first], [finite(score) for score in second]
