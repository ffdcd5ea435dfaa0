"""Running a model over many rows at once: each row's keys and values are kept from its prompt to its last token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Memory:
    """The rows of one batch in the cache that transformers itself gives the model: right for every family."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def prefill(self, prompts: Sequence[Sequence[int]], keep: int) -> "Tensor":
        """Start with these rows. The logits (rows, keep, vocabulary) at each one's last `keep` tokens."""
        import torch
        from transformers import DynamicCache

        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.model.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        columns = torch.arange(width, device=self.model.device)
        self.mask = (columns >= width - lengths[:, None]).long()
        self.cache = DynamicCache(config=self.model.config)
        positions = (columns - (width - lengths)[:, None]).clamp(min=0)
        self.lengths = lengths
        return self._forward(ids, positions, keep)

    def step(self, tokens: "Tensor") -> "Tensor":
        """Append one token to each row. The logits (rows, vocabulary) after it."""
        import torch

        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        return self._forward(tokens[:, None], positions, 1)[:, 0]

    def keep(self, rows: "Tensor") -> None:
        """Forget every row but these (indices)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _forward(self, ids: "Tensor", positions: "Tensor", keep: int) -> "Tensor":
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits
