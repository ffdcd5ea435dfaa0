"""The KV cache that works with every model: rows run in padded batches, as transformers runs them.

`prefix_cache` is faster for the model types that it supports.
"""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class KVCache:
    """The rows of one batch in transformers' own cache. It has the methods of `PrefixCache`."""

    can_join = False  # rows are added all at once, to an empty cache

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.accepted = signature(type(model).forward).parameters  # training wraps the method of the object

    def add(self, rows: Sequence[Sequence[int]], keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Run the model on `rows`, which become the rows of the cache.

        Args:
            rows: Token ids.
            keeps: For each row the number of its last tokens whose logits are returned.

        Returns:
            For each row the logits (keep, vocabulary), in order.
        """
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
        """Append one token (rows,) to each row. Returns the logits after it (rows, vocabulary)."""
        import torch

        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        return self._forward(tokens[:, None], positions, 1)[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows at these indices, in this order, and drop the others."""
        import torch

        kept = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        self.cache.reorder_cache(kept)  # of the kinds of cache that linear attention has, few can select
        self.mask, self.lengths = self.mask[kept], self.lengths[kept]

    def _forward(self, ids: "Tensor", positions: "Tensor", keep: int) -> "Tensor":
        # Mamba names its cache otherwise, and masks tokens of this pass only. Neither Mamba nor Bloom takes positions.
        is_mamba = "cache_params" in self.accepted
        possible: dict[str, Any] = {
            "position_ids": positions,
            "output_router_logits": False,  # for a loss in training, which does not fit a pass with a cache
            "cache_params" if is_mamba else "past_key_values": self.cache,
        }
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, -ids.shape[1] :] if is_mamba else self.mask,
            use_cache=True,
            logits_to_keep=keep,
            **{name: value for name, value in possible.items() if name in self.accepted},
        ).logits
        return logits
