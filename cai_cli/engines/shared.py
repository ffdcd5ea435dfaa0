"""Running many rows that start alike: what they share is run once and kept once; nothing is copied as rows grow.

Each row attends to the shared start and to its own tokens in two products of which one softmax is made (as in cascade
attention), grouped query heads as rows of their key head. The masks come from positions, not from columns, so left
padding may stand between the shared start and a row's own tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Families whose attention passes on what `attend` needs; each is held against transformers in the tests.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "phi3"})
FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # the others change with the longest row of a batch
LEAST_SHARED = 16  # tokens: about what a forward pass of its own costs
_ATTENTION = "cai_shared"
Context = tuple[int, ...]  # ids to run the model over
_FAR = 1 << 30  # the position of a column that holds no token


def can_share(model: Any) -> bool:
    """Whether `SharedMemory` gives this model's own answers; switches its attention over if so."""
    from transformers import AttentionInterface

    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in FAMILIES or rope.get("rope_type", "default") not in FIXED_ROPE:
        return False
    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)
    return True


def _attention(
    module: Any,
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Tensor | None",
    *,
    memory: "SharedMemory",
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple["Tensor", None]:
    out = memory.attend(module.layer_idx, query * scaling, key, value, sliding_window, softcap)
    return out.transpose(1, 2), None


class SharedMemory:
    """The rows of one batch; also the cache object that the model updates. `room`: tokens a row may grow by."""

    def __init__(self, model: Any, pad_id: int, room: int) -> None:
        self.model, self.pad_id, self.room = model, pad_id, room
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer keys and values (heads, tokens, size)
        self.prefix_length = 0
        self.buffers: list[tuple[Tensor, Tensor]] = []  # per layer (rows, heads, columns, size)

    # --- what the engine asks ---------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Sequence[int]], keep: int) -> "Tensor":
        """Start with these rows. The logits (rows, keep, vocabulary) at each one's last `keep` tokens.

        Quickest when rows of like length are neighbours. Rows that are equal are run once.
        """
        import torch

        order = [tuple(prompt) for prompt in prompts]
        self._run_prefix(order, keep)
        start, device = self.prefix_length, self.model.device
        places = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(order))}
        lengths = [len(prompt) for prompt in places]
        width = max(lengths) - start
        self.count, self.width, self.used = len(order), width + self.room, width
        self.positions = torch.full((len(places), self.width), _FAR, device=device)
        ids = torch.full((len(places), width), self.pad_id, device=device)
        for prompt, row in places.items():
            own = slice(width + start - len(prompt), width)
            ids[row, own] = torch.tensor(prompt[start:], device=device)
            self.positions[row, own] = torch.arange(start, len(prompt), device=device)
        logits = []
        for rows in self._chunks([length - start for length in lengths]):
            first = width + start - max(lengths[rows])
            for columns in self._spans(first, width, keep):
                out = self._forward(ids[rows, columns], rows, columns, first, keep)
            # A batch of short rows holds fewer than `keep` columns: zeros stand before them, which nobody reads.
            logits.append(torch.nn.functional.pad(out, (0, 0, keep - out.shape[1], 0)))
        sources = [places[prompt] for prompt in order]
        # Backwards, as a row's source stands at its own place or before it.
        self._copy([(to, source) for to, source in enumerate(sources) if to != source][::-1])
        self.positions = self.positions[sources]
        self.lengths = torch.tensor([lengths[source] for source in sources], device=device)
        whole = torch.cat(logits)
        return whole if len(places) == len(order) else whole[sources]

    def step(self, tokens: "Tensor") -> "Tensor":
        """Append one token to each row. The logits (rows, vocabulary) after it."""
        rows, column = slice(0, self.count), slice(self.used, self.used + 1)
        self.positions[:, column] = self.lengths[:, None]
        self.lengths = self.lengths + 1
        self.used += 1
        return self._forward(tokens[:, None], rows, column, 0, 1)[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was, which stands at its place or after it; the others are forgotten."""
        self._copy([(to, source) for to, source in enumerate(rows) if to != source])
        self.count = len(rows)
        self.positions, self.lengths = self.positions[list(rows)], self.lengths[list(rows)]

    def _copy(self, moves: Sequence[tuple[int, int]]) -> None:
        for to, source in moves:
            for keys, values in self.buffers:
                keys[to, :, : self.used] = keys[source, :, : self.used]
                values[to, :, : self.used] = values[source, :, : self.used]

    # --- running the model ------------------------------------------------------------------------------------

    @property
    def _budget(self) -> int:
        """Tokens of one forward pass: enough to keep the device busy, few enough for its memory."""
        return 512 if self.model.device.type == "cpu" else 16384

    def _run_prefix(self, prompts: Sequence[Context], keep: int) -> None:
        shared = min(common_start(min(prompts), max(prompts)), min(len(prompt) for prompt in prompts) - keep)
        if len(prompts) < 2 or shared < LEAST_SHARED:
            return
        alone = SharedMemory(self.model, self.pad_id, 0)
        alone.prefill([prompts[0][:shared]], 1)
        self.prefix = [(keys[0], values[0]) for keys, values in alone.buffers]
        self.prefix_length = shared

    def _chunks(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Neighbouring rows to run together."""
        start, widest = 0, 0
        for row, length in enumerate(lengths):
            widest = max(widest, length)
            if row > start and widest * (row - start + 1) > self._budget:
                yield slice(start, row)
                start, widest = row, length
        yield slice(start, len(lengths))

    def _spans(self, first: int, end: int, keep: int) -> Iterator[slice]:
        """The columns from `first` to `end` in pieces, the last one whole enough to hold the logits asked for."""
        size = max(self._budget, keep)
        middle = list(range(end - size, first, -size))[::-1]
        for start, stop in zip([first, *middle], [*middle, end], strict=True):
            yield slice(start, stop)

    def _forward(self, ids: "Tensor", rows: slice, columns: slice, first: int, keep: int) -> "Tensor":
        """Run `ids` (rows, columns), which see their rows' own columns from `first` on."""
        self.rows, self.columns, self.first = rows, columns, first
        self.masks: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        positions = self.positions[rows, columns]
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions.where(positions != _FAR, 0),  # padding may have any: nothing looks at it
            past_key_values=self,
            use_cache=True,
            logits_to_keep=keep,
            memory=self,
        ).logits
        return logits

    # --- what the model asks ----------------------------------------------------------------------------------

    def update(self, keys: "Tensor", values: "Tensor", layer: int, *_: Any) -> tuple["Tensor", "Tensor"]:
        """Store what a layer made of the current columns; all that the rows have of their own so far."""
        if layer == len(self.buffers):
            heads, size = keys.shape[1], keys.shape[3]
            # Zeros, as an unused column's weight of 0 must not meet a NaN. Keys lie column by column in memory: the
            # product with a few queries reads them a third faster.
            stored_keys = keys.new_zeros(self.count, heads, size, self.width).transpose(2, 3)
            self.buffers.append((stored_keys, values.new_zeros(self.count, heads, self.width, values.shape[-1])))
        all_keys, all_values = self.buffers[layer]
        all_keys[self.rows, :, self.columns] = keys
        all_values[self.rows, :, self.columns] = values
        seen = slice(self.first, self.columns.stop)
        return all_keys[self.rows, :, seen], all_values[self.rows, :, seen]

    def attend(
        self, layer: int, query: "Tensor", keys: "Tensor", values: "Tensor", window: int | None, softcap: float | None
    ) -> "Tensor":
        """Attention of `query` (rows, heads, new, size), already scaled, over the shared start and `keys`, `values`
        (rows, key heads, seen, size)."""
        rows, heads, new, size = query.shape
        key_heads = keys.shape[1]
        grouped = query.reshape(rows, key_heads, -1, size)  # (rows, key heads, group * new, size)
        own_mask, prefix_mask = self._mask(window)
        own = _scores(grouped.flatten(0, 1), keys.flatten(0, 1), softcap).view(rows, heads, new, -1)
        own = own.add_(own_mask).view(rows, key_heads, heads // key_heads * new, -1)
        if not self.prefix:
            weights = own.softmax(-1).to(values.dtype)
            return (weights.flatten(0, 1) @ values.flatten(0, 1)).view(rows, heads, new, -1)

        start_keys, start_values = self.prefix[layer]
        by_head = grouped.transpose(0, 1).reshape(key_heads, -1, size)
        start = _scores(by_head, start_keys, softcap)
        if prefix_mask is not None:
            start.view(key_heads, rows, -1, new, self.prefix_length).add_(prefix_mask[None])
        swap = (key_heads, rows, heads // key_heads * new)
        top = own.amax(-1).maximum(start.amax(-1).view(swap).transpose(0, 1))
        own = own.sub_(top[..., None]).exp_()
        start = start.sub_(top.transpose(0, 1).reshape(key_heads, -1, 1)).exp_()
        total = own.sum(-1) + start.sum(-1).view(swap).transpose(0, 1)
        from_start = (start.to(values.dtype) @ start_values).view(*swap, -1).transpose(0, 1)
        from_own = (own.to(values.dtype).flatten(0, 1) @ values.flatten(0, 1)).view(from_start.shape)
        out = (from_own + from_start) / total[..., None]
        return out.to(values.dtype).view(rows, heads, new, -1)

    def _mask(self, window: int | None) -> tuple["Tensor", "Tensor | None"]:
        """What to add to the scores of own tokens (rows, 1, new, seen) and, where a window may hide some of the
        shared start, to its (rows, 1, new, prefix)."""
        import torch

        if window not in self.masks:
            lowest = torch.finfo(torch.float32).min
            at = self.positions[self.rows, self.columns][:, None, :, None]
            seen = self.positions[self.rows, self.first : self.columns.stop][:, None, None, :]
            allowed, prefix_mask = seen <= at, None
            if window is not None:
                allowed &= seen > at - window
                start = torch.arange(self.prefix_length, device=at.device)
                prefix_mask = torch.zeros(1, device=at.device).where(start > at - window, lowest)
            self.masks[window] = torch.zeros(1, device=at.device).where(allowed, lowest), prefix_mask
        return self.masks[window]


def _scores(query: "Tensor", keys: "Tensor", softcap: float | None) -> "Tensor":
    """In float32, whatever the model's dtype: the softmax is made of these."""
    import torch

    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items the two start with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def groups(rows: Sequence[Context]) -> list[list[Context]]:
    """The rows in groups that each start alike, so that the fewest tokens are run when each start is run once."""
    return _best_groups(sorted(rows))[1] if rows else []


def _best_groups(rows: list[Context]) -> tuple[int, list[list[Context]]]:
    """The cost in tokens and the groups of sorted `rows`: one group, or the best ones of each next token."""
    start = min(common_start(rows[0], rows[-1]), min(len(row) for row in rows) - 1)
    whole = LEAST_SHARED + start + sum(len(row) - start for row in rows)
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row[start])]
    if len(parts) == 1:
        return whole, [rows]
    best = [_best_groups(part) for part in parts]
    cost = sum(cost for cost, _ in best)
    return (cost, [group for _, found in best for group in found]) if cost < whole else (whole, [rows])
