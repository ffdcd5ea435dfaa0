"""Running a model over many rows at once: each row's keys and values are kept from its prompt to its last token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SHARED = 16


class Memory:
    """The rows of one batch in the cache that transformers itself gives the model: right for every family."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

    def prefill(self, prompts: Sequence[Sequence[int]], keep: int) -> "Tensor":
        """Start with these rows. The logits (rows, keep, vocabulary) at each one's last `keep` tokens."""
        import torch
        from transformers import DynamicCache

        device = self.model.device
        shared = self._shared(prompts, keep)
        self.cache = DynamicCache(config=self.model.config)
        if shared:
            # What all rows start with (few-shot examples) is run once, then repeated for each row.
            start = torch.tensor([prompts[0][:shared]], device=device)
            self.model(input_ids=start, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache.batch_repeat_interleave(len(prompts))
        rests = [list(prompt[shared:]) for prompt in prompts]
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[self.pad_id] * (width - len(rest)) + rest for rest in rests], device=device)
        padding = width - torch.tensor([len(rest) for rest in rests], device=device)
        columns = torch.arange(width, device=device)
        own = (columns >= padding[:, None]).long()
        self.mask = torch.cat([torch.ones(len(rests), shared, dtype=torch.long, device=device), own], dim=1)
        self.lengths = shared + width - padding
        positions = shared + (columns - padding[:, None]).clamp(min=0)
        return self._forward(ids, positions, keep)

    def _shared(self, prompts: Sequence[Sequence[int]], keep: int) -> int:
        """How many ids all prompts start with, less what must be read at their ends; 0 where sharing does not pay or
        where a sliding window counts columns, padding among them."""
        config = self.model.config.get_text_config()
        layers = getattr(config, "layer_types", None) or ["full_attention"]
        sliding = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in layers)
        if sliding or len(prompts) < 2:
            return 0
        low, high = min(map(list, prompts)), max(map(list, prompts))  # what the two extremes share, all share
        common = next((i for i, (x, y) in enumerate(zip(low, high, strict=False)) if x != y), min(len(low), len(high)))
        common = min(common, min(len(p) for p in prompts) - keep)
        return common if common >= LEAST_SHARED else 0

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
