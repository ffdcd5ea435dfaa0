"""Running any model over many rows at once, as transformers does it; `shared` is quicker for the families it knows."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class KVCache:
    """The rows of one batch in the cache that transformers itself gives the model: right for every family."""

    joins = False  # rows come all at once, when there are none

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def add(self, rows: Sequence[Sequence[int]], keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Start with these rows. For each the logits (keep, vocabulary) at its last `keep` tokens, in order."""
        import torch
        from transformers import DynamicCache

        width, device = max(len(row) for row in rows), self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        positions = torch.arange(width, device=device) - (width - self.lengths)[:, None]
        self.mask = (positions >= 0).long()
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, positions.clamp(min=0), max(keeps))
        yield from (row[len(row) - keep :] for row, keep in zip(logits, keeps, strict=True))

    def step(self, tokens: "Tensor") -> "Tensor":
        """Append one token to each row. The logits (rows, vocabulary) after it."""
        import torch

        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        return self._forward(tokens[:, None], positions, 1)[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was; the others are forgotten."""
        import torch

        kept = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        self.cache.batch_select_indices(kept)
        self.mask, self.lengths = self.mask[kept], self.lengths[kept]

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
