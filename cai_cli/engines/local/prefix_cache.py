"""Continuous batching without padding, with shared-prefix caching: a prefix that rows share is run and stored once.

The tokens of one forward pass are concatenated without padding, whichever rows they belong to (as in vLLM).
`packed_attention` computes their attention.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from cai_cli.engines.local.decode_kernels import LANES
from cai_cli.engines.local.decode_step import decode_step
from cai_cli.engines.local.packed_attention import PackedPass, attend
from cai_cli.engines.local.static_step import StaticSteps

if TYPE_CHECKING:
    from torch import Tensor

# Model types whose attention passes on the arguments of `attend`. The tests compare each with transformers.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"})
# Types of rotary positions that do not depend on the longest row of a batch. `rope` holds "longrope" fixed, and says
# why "dynamic" is among them.
FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn", "longrope", "dynamic"})
MIN_SHARED_TOKENS = 16  # a shorter prefix is not worth a separate forward pass
MAX_GROUP_DEPTH = 100  # limits the recursion of `prefix_groups`
_ATTENTION = "cai_shared"
TokenIds = tuple[int, ...]


def enable_prefix_cache(model: Any) -> bool:
    """Switch the model's attention to `PrefixCache`, if it supports this model.

    Returns:
        Whether it does. If not, the model is unchanged.
    """
    from transformers import AttentionInterface

    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # Gemma 3: one per kind of layer
    fixed = all(one.get("rope_type", "default") in FIXED_ROPE for one in ropes)
    if config.model_type not in MODEL_TYPES or not fixed or getattr(config, "use_bidirectional_attention", False):
        return False
    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)
    return True


def _attention(
    module: Any,
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    _mask: "Tensor | None",
    *,
    prefix_cache: "PrefixCache",
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple["Tensor", None]:
    # `key` and `value` come from `PrefixCache.update`: those of every token of the rows, not only of the new ones.
    return prefix_cache.attend(module.layer_idx, query * scaling, key, value, sliding_window, softcap), None


class PrefixCache:
    """The KV cache of rows that share a prefix; also the cache object that the model itself updates.

    Rows may join (`add`) and leave (`keep`) at any time.

    Args:
        model: A model for which `enable_prefix_cache` returned True.
        start: The token ids of the shared prefix, which may be empty.
        room: The number of tokens that a row may grow by.
    """

    can_join = True

    def __init__(self, model: Any, start: TokenIds, room: int) -> None:
        self.model, self.start, self.room = model, start, room
        self.lengths: list[int] = []  # own tokens of each row, without the shared prefix
        self.prefix: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer: (heads, tokens, size)
        self.buffers: list[tuple[Tensor, Tensor]] = []  # those of the rows: (rows, heads, columns, size)
        self.capacity = (0, 0)  # rows, columns
        self.quick_step = decode_step(model)
        self.static_steps: StaticSteps | None = None
        self.is_static = model.device.type == "cuda"
        if start:
            alone = PrefixCache(model, (), 0)
            list(alone.add([start], [1]))
            self.prefix = [(keys[0, :, : len(start)], values[0, :, : len(start)]) for keys, values in alone.buffers]

    # --- called by the engine ---------------------------------------------------------------------------------

    def add(self, rows: Sequence[TokenIds], keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Run the model on `rows`, which join the rows already in the cache.

        It is fastest if rows of similar length are neighbours. Equal neighbours are run once.

        Args:
            rows: Token ids, each starting with the shared prefix.
            keeps: For each row the number of its last tokens whose logits are returned.

        Returns:
            For each row the logits (keep, vocabulary), in order. The iterator must be exhausted.
        """
        place = len(self.lengths)
        self._reserve(place + len(rows), max(len(row) for row in rows) - len(self.start) + self.room)
        self.lengths += [len(row) - len(self.start) for row in rows]
        distinct = [[i for i, _ in equal] for _, equal in groupby(enumerate(rows), key=lambda pair: pair[1])]
        own = [rows[same[0]][len(self.start) :] for same in distinct]
        for same, logits in zip(distinct, self._run(own, place, [keeps[same[0]] for same in distinct]), strict=True):
            yield from [logits] * len(same)
        # In reverse, because the source of a copy is at the same index or before it.
        copies = [(place + i, place + source) for source, same in enumerate(distinct) for i in same if i != source]
        for to, source in copies[::-1]:
            self._copy(to, source, self.lengths[to])

    def step(self, tokens: "Tensor") -> "Tensor":
        """Append one token (rows,) to each row. Returns the logits after it (rows, vocabulary)."""
        self.lengths = [length + 1 for length in self.lengths]
        if self.quick_step is not None:
            return self.quick_step(tokens, self.lengths, self.buffers, self.prefix)
        if self.is_static:
            self.static_steps = self.static_steps or StaticSteps(self)
            return self.static_steps(tokens, self.lengths)
        return self._forward(tokens, [(row, length - 1, length) for row, length in enumerate(self.lengths)], 0)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows at these indices, in this order, and drop the others. Each moves to its own index or before."""
        for to, source in enumerate(rows):
            if to != source:
                self._copy(to, source, self.lengths[source])
        self.lengths = [self.lengths[row] for row in rows]

    def _copy(self, to: int, source: int, used: int) -> None:
        for keys, values in self.buffers:
            keys[to, :, :used] = keys[source, :, :used]
            values[to, :, :used] = values[source, :, :used]

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room for this many rows and columns, by moving the rows into larger buffers if necessary."""
        if rows <= self.capacity[0] and columns <= self.capacity[1]:
            return
        used = max(self.lengths, default=0)
        self.capacity = rows, max(columns, used + self.room)
        self.static_steps = None  # its graphs hold the addresses of the buffers
        for layer, old in enumerate(self.buffers):
            self.buffers[layer] = self._buffers(*old)
            for new, before in zip(self.buffers[layer], old, strict=True):
                new[: len(self.lengths), :, :used] = before[: len(self.lengths), :, :used]

    def _buffers(self, keys: "Tensor", values: "Tensor") -> tuple["Tensor", "Tensor"]:
        """New buffers for keys and values, filled with zeros: unused columns have weight 0, and 0 * NaN would be NaN.

        Keys are stored column by column, which a product with a few queries reads a third faster, in whole vectors.
        """
        (rows, columns), (_, heads, _, size) = self.capacity, keys.shape
        vectors = columns + -columns % LANES
        stored_keys = keys.new_zeros(rows, heads, size, vectors).transpose(2, 3)
        return stored_keys[:, :, :columns], values.new_zeros(rows, heads, vectors, size)[:, :, :columns]

    # --- running the model ------------------------------------------------------------------------------------

    @property
    def _budget(self) -> int:
        """The most tokens in one forward pass: enough to keep the device busy, few enough for its memory."""
        return 512 if self.model.device.type == "cpu" else 16384

    def _run(self, rows: Sequence[TokenIds], place: int, keeps: Sequence[int]) -> Iterator["Tensor"]:
        """Fill the rows from index `place` on with these tokens. Returns the logits at the last `keep` of each."""
        import torch

        parts: list[Tensor] = []
        for pieces in self._passes([len(row) for row in rows]):
            tokens = torch.tensor([token for row, start, end in pieces for token in rows[row][start:end]])
            ends = list(accumulate(end - start for _, start, end in pieces))
            kept = [min(max(end - len(rows[row]) + keeps[row], 0), end - start) for row, start, end in pieces]
            logit_indices = torch.cat([torch.arange(end - keep, end) for end, keep in zip(ends, kept, strict=True)])
            moved = [(place + row, start, end) for row, start, end in pieces]
            logits = self._forward(tokens.to(self.model.device), moved, logit_indices.to(self.model.device))
            for (row, _, end), keep, last in zip(pieces, kept, accumulate(kept), strict=True):
                parts.append(logits[last - keep : last])
                if end == len(rows[row]):
                    yield torch.cat(parts)
                    parts = []

    def _passes(self, lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
        """The pieces of rows to run in each forward pass, as (row, first column, end), in order."""
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

    def _forward(
        self, tokens: "Tensor", pieces: Sequence[tuple[int, int, int]], logit_indices: "Tensor | int"
    ) -> "Tensor":
        """Run the model on `tokens` (tokens,), which are these pieces of neighbouring rows.

        Returns:
            The logits (indices, vocabulary) at the token indices `logit_indices`, or at all tokens if it is 0.
        """
        import torch

        device = self.model.device
        counts = [end - start for _, start, end in pieces]
        columns = torch.tensor([column for _, start, end in pieces for column in range(start, end)], device=device)
        slots = torch.tensor([row for row, start, end in pieces for _ in range(start, end)], device=device)
        self.current_pass = PackedPass(pieces[0][0], counts, columns, slots, [end for _, _, end in pieces])
        logits: Tensor = self.model(
            input_ids=tokens[None],
            position_ids=columns[None] + len(self.start),
            past_key_values=self,
            use_cache=True,
            logits_to_keep=logit_indices,
            prefix_cache=self,
        ).logits
        return logits[0]

    # --- called by the model ----------------------------------------------------------------------------------

    def update(self, keys: "Tensor", values: "Tensor", layer: int, *_: Any) -> tuple["Tensor", "Tensor"]:
        """Store one layer's keys and values of the tokens of this pass (1, heads, tokens, size).

        Returns:
            Those of all own tokens of the rows of this pass (rows, heads, columns, size).
        """
        if layer == len(self.buffers):
            self.buffers.append(self._buffers(keys, values))
        all_keys, all_values = self.buffers[layer]
        current = self.current_pass
        all_keys[current.slots, :, current.columns] = keys[0].transpose(0, 1)
        all_values[current.slots, :, current.columns] = values[0].transpose(0, 1)
        return all_keys[current.rows], all_values[current.rows]

    def attend(
        self, layer: int, query: "Tensor", keys: "Tensor", values: "Tensor", window: int | None, softcap: float | None
    ) -> "Tensor":
        """Attention over the shared prefix and the rows' own tokens.

        Args:
            layer: The index of the layer.
            query: (1, heads, tokens, size), already scaled.
            keys: (rows, key heads, columns, size).
            values: As `keys`.
            window: The length of the layer's sliding window in tokens, if it has one.
            softcap: The layer's soft cap on scores, if it has one.

        Returns:
            (1, tokens, heads, size).
        """
        prefix = self.prefix[layer] if self.start else None
        return attend(self.current_pass, query, keys, values, prefix, window, softcap)


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix of two sequences.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def shared_prefix(rows: Sequence[TokenIds], keeps: Sequence[int]) -> TokenIds:
    """The common prefix of all rows, or () if it is not worth a separate forward pass.

    Args:
        rows: Token ids.
        keeps: For each row the number of last tokens that must stay outside the prefix.
    """
    shared = common_prefix_length(min(rows), max(rows))
    shared = min(shared, *(len(row) - keep for row, keep in zip(rows, keeps, strict=True)))
    return rows[0][:shared] if len(rows) > 1 and shared >= MIN_SHARED_TOKENS else ()


def prefix_groups(rows: Sequence[TokenIds]) -> list[list[TokenIds]]:
    """The rows in groups with a common prefix each, which minimise the tokens to run."""
    return _best_groups(sorted(rows))[1] if rows else []


def _best_groups(rows: list[TokenIds], depth: int = 0) -> tuple[int, list[list[TokenIds]]]:
    """The cost in tokens and the groups of sorted `rows`: one group, or the best groups for each next token.

    Prefixes nested deeper than `MAX_GROUP_DEPTH` are one group.
    """
    start = min(common_prefix_length(rows[0], rows[-1]), min(len(row) for row in rows) - 1)
    whole = MIN_SHARED_TOKENS + start + sum(len(row) - start for row in rows)
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row[start])]
    if len(parts) == 1 or depth == MAX_GROUP_DEPTH:
        return whole, [rows]
    best = [_best_groups(part, depth + 1) for part in parts]
    cost = sum(cost for cost, _ in best)
    return (cost, [group for _, groups in best for group in groups]) if cost < whole else (whole, [rows])
