"""Running many rows that start alike: what they share is run once and kept once, and rows come and go one by one.

The tokens of one forward pass lie end to end with no padding, whichever rows they belong to (as in vLLM). Each row
attends to the shared start and to its own tokens in two products under one softmax (much as in cascade attention),
grouped query heads as rows of their key head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Families whose attention passes on what `attend` needs; each is held against transformers in the tests.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"})
FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # the others change with the longest row of a batch
LEAST_SHARED = 16  # tokens: about what a forward pass of its own costs
DEEPEST = 100  # Python's stack has an end
_TOGETHER = 16  # rows: a long one among many short ones makes a CPU read as much for each of them
_ATTENTION = "cai_shared"
Context = tuple[int, ...]  # ids to run the model over


def can_share(model: Any) -> bool:
    """Whether `PrefixCache` gives this model's own answers; switches its attention over if so."""
    from transformers import AttentionInterface

    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # Gemma 3: one per kind of layer
    fixed = all(one.get("rope_type", "default") in FIXED_ROPE for one in ropes)
    if config.model_type not in FAMILIES or not fixed or getattr(config, "use_bidirectional_attention", False):
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
    memory: "PrefixCache",
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple["Tensor", None]:
    # `key` and `value` are what `PrefixCache.update` gave: those of every token of the rows, not only the new ones.
    return memory.attend(module.layer_idx, query * scaling, key, value, sliding_window, softcap), None


@dataclass
class _Pass:
    """The tokens of one forward pass, end to end: `counts[i]` of row `first + i`, at the columns `columns`."""

    first: int
    counts: list[int]
    columns: "Tensor"  # (tokens,): a row's own tokens stand in columns 0, 1, ...
    slots: "Tensor"  # (tokens,): the row of each
    ends: list[int]  # of each row: the columns it has by now
    together: int  # rows whose attention is one product
    masks: dict[int | None, tuple["Tensor", "Tensor | None"]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        return max(self.counts)

    @property
    def parts(self) -> Iterator[tuple[slice, int]]:
        """Neighbouring rows, and the columns that any of them looks at."""
        for at in range(0, len(self.ends), self.together):
            part = slice(at, at + self.together)
            yield part, max(self.ends[part])

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.counts))

    def by_row(self, flat: "Tensor") -> "Tensor":
        """(heads, tokens, size) as (rows, heads, most, size), zeros behind the rows that have fewer tokens."""
        if sum(self.counts) == len(self.counts) * self.most:
            return flat.view(flat.shape[0], len(self.counts), self.most, -1).transpose(0, 1)
        padded = flat.new_zeros(len(self.counts), self.most, flat.shape[0], flat.shape[2])
        padded[self._places] = flat.transpose(0, 1)
        return padded.transpose(1, 2)

    def flat(self, by_row: "Tensor") -> "Tensor":
        """(rows, heads, most, size) as (tokens, heads, size)."""
        if sum(self.counts) == len(self.counts) * self.most:
            return by_row.transpose(1, 2).flatten(0, 1)
        return by_row.transpose(1, 2)[self._places]

    @property
    def _places(self) -> tuple["Tensor", "Tensor"]:
        import torch

        offsets = torch.cat([torch.arange(count, device=self.columns.device) for count in self.counts])
        return self.slots - self.first, offsets


class PrefixCache:
    """Rows that all begin with `start`; also the cache object that the model updates. `room`: tokens a row may grow
    by. Rows may join (`add`) and leave (`keep`) at any time."""

    joins = True

    def __init__(self, model: Any, start: Context, room: int) -> None:
        self.model, self.start, self.room = model, start, room
        self.lengths: list[int] = []  # own tokens of each row, without the shared start
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer keys and values (heads, tokens, size)
        self.buffers: list[tuple[Tensor, Tensor]] = []  # per layer (rows, heads, columns, size)
        self.capacity = (0, 0)  # rows, columns
        if start:
            alone = PrefixCache(model, (), 0)
            list(alone.add([start], [1]))
            self.prefix = [(keys[0, :, : len(start)], values[0, :, : len(start)]) for keys, values in alone.buffers]

    # --- what the engine asks ---------------------------------------------------------------------------------

    def add(self, rows: Sequence[Context], keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Run `rows`, which join those already here: for each the logits (keep, vocabulary) at its last `keep` tokens,
        in order. To be iterated to its end. Quickest when rows of like length are neighbours; neighbours that are
        equal are run once."""
        place = len(self.lengths)
        self._reserve(place + len(rows), max(len(row) for row in rows) - len(self.start) + self.room)
        self.lengths += [len(row) - len(self.start) for row in rows]
        distinct = [[i for i, _ in equal] for _, equal in groupby(enumerate(rows), key=lambda pair: pair[1])]
        own = [rows[same[0]][len(self.start) :] for same in distinct]
        for same, logits in zip(distinct, self._run(own, place, [keeps[same[0]] for same in distinct]), strict=True):
            yield from [logits] * len(same)
        # Backwards, as a row's source stands at its own place or before it.
        copies = [(place + i, place + source) for source, same in enumerate(distinct) for i in same if i != source]
        for to, source in copies[::-1]:
            self._copy(to, source, self.lengths[to])

    def step(self, tokens: "Tensor") -> "Tensor":
        """Append one token to each row. The logits (rows, vocabulary) after it."""
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(tokens, [(row, length - 1, length) for row, length in enumerate(self.lengths)], 0)

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was, which stands at its place or after it; the others are forgotten."""
        for to, source in enumerate(rows):
            if to != source:
                self._copy(to, source, self.lengths[source])
        self.lengths = [self.lengths[row] for row in rows]

    def _copy(self, to: int, source: int, used: int) -> None:
        for keys, values in self.buffers:
            keys[to, :, :used] = keys[source, :, :used]
            values[to, :, :used] = values[source, :, :used]

    def _reserve(self, rows: int, columns: int) -> None:
        """Room for this many rows and columns: what is there already is moved into larger buffers."""
        if rows <= self.capacity[0] and columns <= self.capacity[1]:
            return
        used = max(self.lengths, default=0)
        self.capacity = rows, max(columns, used + self.room)
        for layer, old in enumerate(self.buffers):
            self.buffers[layer] = self._buffers(*old)
            for new, before in zip(self.buffers[layer], old, strict=True):
                new[: len(self.lengths), :, :used] = before[: len(self.lengths), :, :used]

    def _buffers(self, keys: "Tensor", values: "Tensor") -> tuple["Tensor", "Tensor"]:
        """Zeros, as an unused column's weight of 0 must not meet a NaN. Keys lie column by column in memory: the
        product with a few queries reads them a third faster."""
        rows, columns = self.capacity
        stored_keys = keys.new_zeros(rows, keys.shape[1], keys.shape[3], columns).transpose(2, 3)
        return stored_keys, values.new_zeros(rows, values.shape[1], columns, values.shape[3])

    # --- running the model ------------------------------------------------------------------------------------

    @property
    def _budget(self) -> int:
        """Tokens of one forward pass: enough to keep the device busy, few enough for its memory."""
        return 512 if self.model.device.type == "cpu" else 16384

    def _run(self, rows: Sequence[Context], place: int, keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Fill the rows from `place` on with these tokens; the logits at each one's last `keep`."""
        import torch

        parts: list[Tensor] = []
        for pieces in self._passes([len(row) for row in rows]):
            tokens = torch.tensor([token for row, start, end in pieces for token in rows[row][start:end]])
            ends = list(accumulate(end - start for _, start, end in pieces))
            kept = [min(max(end - len(rows[row]) + keeps[row], 0), end - start) for row, start, end in pieces]
            wanted = torch.cat([torch.arange(end - keep, end) for end, keep in zip(ends, kept, strict=True)])
            moved = [(place + row, start, end) for row, start, end in pieces]
            logits = self._forward(tokens.to(self.model.device), moved, wanted.to(self.model.device))
            for (row, _, end), keep, last in zip(pieces, kept, accumulate(kept), strict=True):
                parts.append(logits[last - keep : last])
                if end == len(rows[row]):
                    yield torch.cat(parts)
                    parts = []

    def _passes(self, lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
        """What to run together: (row, first column, end) of pieces of neighbouring rows, in order."""
        together: list[tuple[int, int, int]] = []
        widest = 0
        for row, length in enumerate(lengths):
            for start in range(0, length, self._budget):
                end = min(start + self._budget, length)
                widest = max(widest, end - start)
                if together and widest * (len(together) + 1) > self._budget:
                    yield together
                    together, widest = [], end - start
                together.append((row, start, end))
        yield together

    def _forward(self, tokens: "Tensor", pieces: Sequence[tuple[int, int, int]], wanted: "Tensor | int") -> "Tensor":
        """Run `tokens` (tokens,), which belong to these pieces of neighbouring rows. The logits of those at `wanted`
        (0: all)."""
        import torch

        device = self.model.device
        counts = [end - start for _, start, end in pieces]
        columns = torch.tensor([column for _, start, end in pieces for column in range(start, end)], device=device)
        slots = torch.tensor([row for row, start, end in pieces for _ in range(start, end)], device=device)
        ends = [end for _, _, end in pieces]
        together = _TOGETHER if device.type == "cpu" else len(pieces)
        self.now = _Pass(pieces[0][0], counts, columns, slots, ends, together)
        logits: Tensor = self.model(
            input_ids=tokens[None],
            position_ids=columns[None] + len(self.start),
            past_key_values=self,
            use_cache=True,
            logits_to_keep=wanted,
            memory=self,
        ).logits
        return logits[0]

    # --- what the model asks ----------------------------------------------------------------------------------

    def update(self, keys: "Tensor", values: "Tensor", layer: int, *_: Any) -> tuple["Tensor", "Tensor"]:
        """Store what a layer made of the tokens of this pass (1, heads, tokens, size); all that the rows of the pass
        have of their own so far (rows, heads, seen, size)."""
        if layer == len(self.buffers):
            self.buffers.append(self._buffers(keys, values))
        all_keys, all_values = self.buffers[layer]
        now = self.now
        all_keys[now.slots, :, now.columns] = keys[0].transpose(0, 1)
        all_values[now.slots, :, now.columns] = values[0].transpose(0, 1)
        return all_keys[now.rows], all_values[now.rows]

    def attend(
        self, layer: int, query: "Tensor", keys: "Tensor", values: "Tensor", window: int | None, softcap: float | None
    ) -> "Tensor":
        """Attention of `query` (1, heads, tokens, size), already scaled, over the shared start and `keys`, `values`
        (rows, key heads, columns, size): (1, tokens, heads, size)."""
        import torch

        by_row, (own_mask, prefix_mask) = self.now.by_row(query[0]), self._mask(window)
        out = []
        for part, seen in self.now.parts:
            masks = own_mask[part, ..., :seen], None if prefix_mask is None else prefix_mask[part]
            own = keys[part, :, :seen], values[part, :, :seen]
            out.append(self._attend(layer, by_row[part], own, masks, softcap))
        return self.now.flat(torch.cat(out))[None]

    def _attend(
        self,
        layer: int,
        query: "Tensor",
        own: tuple["Tensor", "Tensor"],
        masks: tuple["Tensor", "Tensor | None"],
        softcap: float | None,
    ) -> "Tensor":
        """For some neighbouring rows: query and result (rows, heads, new, size), own keys and values (rows, key heads,
        seen, size), masks as `_mask` gives them."""
        import torch

        (keys, values), (own_mask, prefix_mask) = own, masks
        rows, heads, new, size = query.shape
        key_heads = keys.shape[1]
        grouped = query.reshape(rows, key_heads, -1, size)  # (rows, key heads, group * new, size)
        scores = _scores(grouped.flatten(0, 1), keys.flatten(0, 1), softcap).view(rows, heads, new, -1)
        scores = scores.add_(own_mask).view(rows, key_heads, heads // key_heads * new, -1)
        shared = len(self.start)
        if shared:
            by_head = grouped.transpose(0, 1).reshape(key_heads, -1, size)
            start = _scores(by_head, self.prefix[layer][0], softcap).view(key_heads, rows, -1, shared).transpose(0, 1)
            if prefix_mask is not None:
                start = (start.reshape(rows, heads, new, shared) + prefix_mask).view(start.shape)
            scores = torch.cat([start, scores], -1)
        weights = scores.softmax(-1).to(values.dtype)
        out = torch.bmm(weights[..., shared:].flatten(0, 1), values.flatten(0, 1)).view(rows, key_heads, -1, size)
        if shared:
            by_head = weights[..., :shared].transpose(0, 1).reshape(key_heads, -1, shared)
            out += torch.bmm(by_head, self.prefix[layer][1]).view(key_heads, rows, -1, size).transpose(0, 1)
        return out.view(rows, heads, new, -1)

    def _mask(self, window: int | None) -> tuple["Tensor", "Tensor | None"]:
        """What to add to the scores of own tokens (rows, 1, new, seen) and, where a window may hide some of the
        shared start, to its (rows, 1, new, prefix)."""
        import torch

        masks, columns = self.now.masks, self.now.columns
        if window not in masks:
            lowest, nothing = torch.finfo(torch.float32).min, torch.zeros(1, device=columns.device)
            at = self.now.by_row(columns[None, :, None])[:, :, :, 0, None]  # (rows, 1, new, 1)
            seen = torch.arange(max(self.now.ends), device=columns.device)
            allowed, prefix_mask = seen <= at, None
            if window is not None:
                allowed &= seen > at - window
                start = torch.arange(len(self.start), device=columns.device) - len(self.start)
                prefix_mask = nothing.where(start > at - window, lowest)
            masks[window] = nothing.where(allowed, lowest), prefix_mask
        return masks[window]


def _scores(query: "Tensor", keys: "Tensor", softcap: float | None) -> "Tensor":
    """In float32, whatever the model's dtype: the softmax is made of these."""
    import torch

    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items the two start with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def shared_start(rows: Sequence[Context], keeps: Sequence[int]) -> Context:
    """What all rows start with, if it is worth a pass of its own; at least `keep` tokens are left of each row."""
    shared = common_start(min(rows), max(rows))
    shared = min(shared, *(len(row) - keep for row, keep in zip(rows, keeps, strict=True)))
    return rows[0][:shared] if len(rows) > 1 and shared >= LEAST_SHARED else ()


def groups(rows: Sequence[Context]) -> list[list[Context]]:
    """The rows in groups that each start alike, so that the fewest tokens are run when each start is run once."""
    return _best_groups(sorted(rows))[1] if rows else []


def _best_groups(rows: list[Context], depth: int = 0) -> tuple[int, list[list[Context]]]:
    """The cost in tokens and the groups of sorted `rows`: one group, or the best ones of each next token. Where starts
    lie in one another deeper than `DEEPEST`, they are one group."""
    start = min(common_start(rows[0], rows[-1]), min(len(row) for row in rows) - 1)
    whole = LEAST_SHARED + start + sum(len(row) - start for row in rows)
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row[start])]
    if len(parts) == 1 or depth == DEEPEST:
        return whole, [rows]
    best = [_best_groups(part, depth + 1) for part in parts]
    cost = sum(cost for cost, _ in best)
    return (cost, [group for _, found in best for group in found]) if cost < whole else (whole, [rows])
