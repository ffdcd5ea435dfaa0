"""Two replies to one prompt in one forward pass: the prompt's tokens are computed once.

A packed pair is the tokens both conversations start with, then the rest of the first, then the rest of the second. A
token attends to the shared ones and to those of its own branch, at the position it has in its own conversation, so the
two scores are those of the two conversations alone. Of HH-RLHF's harmlessness pairs this leaves 62% of the tokens.
"""

import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.reward.preference_model import finite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SHARED, PADDING = 0, -1


def packed(first: Sequence[int], second: Sequence[int]) -> dict[str, list[int]]:
    """`input_ids`, `position_ids` and `branches` (0 shared, 1 first, 2 second) of two conversations' ids."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return {
        "input_ids": [*first, *second[shared:]],
        "position_ids": [*range(len(first)), *range(shared, len(second))],
        "branches": [SHARED] * shared + [1] * (len(first) - shared) + [2] * (len(second) - shared),
    }


def collate(pairs: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
    """Packed pairs as tensors of shape (pairs, longest), padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    fill = {"input_ids": pad_token_id, "position_ids": 0, "branches": PADDING}
    batch = {
        name: pad_sequence([torch.tensor(pair[name]) for pair in pairs], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    return {**batch, "attention_mask": (batch["branches"] != PADDING).long()}


def take_packed_pairs(model: "PreTrainedModel", longest: tuple[list[int], list[int]]) -> bool:
    """Let a sequence classifier take packed pairs, whose `logits` are those of the first conversations, then those of
    the second, shape (2 * pairs, 1); other inputs go through as before.

    Returns False, with the model as it was, where packing would change the scores: `longest`, the ids of the longest
    pair, is scored both ways (layers that look back over a window, or that are no attention, tell there).
    """
    import torch
    from transformers.modeling_layers import GenericForSequenceClassification

    if not isinstance(model, GenericForSequenceClassification):
        return False
    model.forward = types.MethodType(_forward, model)
    batch = collate([packed(*longest)], model.config.get_text_config().pad_token_id)
    model.eval()
    with torch.inference_mode():
        both = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        alone = torch.cat([model(input_ids=torch.tensor([ids], device=model.device)).logits for ids in longest])
    same = torch.allclose(both.float(), alone.float(), atol=1e-3, rtol=1e-3)
    if not same:
        del model.forward
    return same


def _forward(self: Any, input_ids: Any = None, branches: Any = None, **inputs: Any) -> Any:
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    if branches is None:
        return type(self).forward(self, input_ids, **inputs)
    columns = torch.arange(branches.shape[1], device=branches.device)
    before = columns[:, None] >= columns
    own = branches[:, :, None] == branches[:, None, :]
    sees = before & (own | (branches[:, None, :] == SHARED))
    hidden = self.base_model(
        input_ids, attention_mask=sees[:, None], position_ids=inputs["position_ids"], use_cache=False
    ).last_hidden_state
    # The library reads a score at the last token that is not the padding token, whatever stands behind it.
    read = input_ids != self.config.get_text_config().pad_token_id
    mine = ((branches == SHARED) | (branches == branch) for branch in (1, 2))
    ends = torch.cat([(columns * (read & tokens)).argmax(-1) for tokens in mine])
    rows = torch.arange(len(branches), device=branches.device).repeat(2)
    return SequenceClassifierOutput(logits=self.score(hidden[rows, ends]))


def read_pairs(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple["Tensor", "Tensor"]:
    """What the head gives for the first and for the second conversation of each pair, each (pairs, outputs) on the CPU,
    by a model that takes packed pairs. The model is left in evaluation mode."""
    import torch

    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))
    first, second = [], []
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = collate(
            [packed(*pairs[i]) for i in order[start : start + batch_size]], model.config.get_text_config().pad_token_id
        )
        with torch.inference_mode():
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        one, other = logits.float().cpu().chunk(2)
        first.append(one)
        second.append(other)
    back = torch.tensor(order).argsort()
    return torch.cat(first)[back], torch.cat(second)[back]


def score_pairs(
    model: "PreTrainedModel", pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> tuple[list[float], list[float]]:
    """The scores of the first and of the second conversation of each pair. Raises CaiError when one is no number."""
    if not pairs:
        return [], []
    first, second = (scores[:, 0].tolist() for scores in read_pairs(model, pairs, batch_size))
    return [finite(score) for score in first], [finite(score) for score in second]
