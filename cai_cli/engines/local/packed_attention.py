"""Attention of rows whose tokens are concatenated without padding, over a prefix that they share and their own tokens.

Each row attends to the shared prefix and to its own tokens in two products under one softmax (similar to cascade
attention). Grouped query heads are computed as rows of their key head. Queries are taken a few at a time, so that the
scores of a long row (heads x queries x keys) need bounded memory, and keys after a query are not multiplied.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROWS_PER_PRODUCT = 16  # on CPUs: every row of a product costs as much as the longest one
MAX_SCORES = {"cpu": 2**22, "cuda": 2**28}  # scores in memory at once, 4 bytes each and as much again for the softmax


@dataclass
class PackedPass:
    """The tokens of one forward pass, concatenated: `counts[i]` tokens of row `first + i`.

    Attributes:
        first: The index of the first row.
        counts: The number of new tokens of each row.
        columns: (tokens,): the position of each token among its row's own tokens.
        slots: (tokens,): the row of each token.
        ends: The number of own tokens of each row after this pass.
        masks: The masks of products that take all queries of their rows, which every layer uses again.
    """

    first: int
    counts: list[int]
    columns: "Tensor"
    slots: "Tensor"
    ends: list[int]
    masks: dict[tuple[int | None, int], tuple["Tensor", "Tensor | None"]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """The largest number of new tokens of one row."""
        return max(self.counts)

    @cached_property
    def starts(self) -> list[int]:
        """The number of own tokens of each row before this pass."""
        return [end - count for end, count in zip(self.ends, self.counts, strict=True)]

    @property
    def parts(self) -> Iterator[slice]:
        """Slices of neighbouring rows for one product each."""
        step = ROWS_PER_PRODUCT if self.columns.device.type == "cpu" else len(self.ends)
        return (slice(start, start + step) for start in range(0, len(self.ends), step))

    @property
    def rows(self) -> slice:
        """The rows of this pass in the buffers."""
        return slice(self.first, self.first + len(self.counts))

    def positions(self, rows: slice, first: int, count: int) -> "Tensor":
        """(rows, count): the column of each query from `first` on among its row's own tokens."""
        import torch

        device = self.columns.device
        return torch.tensor(self.starts[rows], device=device)[:, None] + torch.arange(
            first, first + count, device=device
        )

    def by_row(self, flat: "Tensor") -> "Tensor":
        """(heads, tokens, size) as (rows, heads, most, size), with zeros after the tokens of shorter rows."""
        if sum(self.counts) == len(self.counts) * self.most:
            return flat.view(flat.shape[0], len(self.counts), self.most, -1).transpose(0, 1)
        padded = flat.new_zeros(len(self.counts), self.most, flat.shape[0], flat.shape[2])
        padded[self._places] = flat.transpose(0, 1)
        return padded.transpose(1, 2)

    def flat(self, by_row: "Tensor") -> "Tensor":
        """(rows, heads, most, size) as (tokens, heads, size); the inverse of `by_row`."""
        if sum(self.counts) == len(self.counts) * self.most:
            return by_row.transpose(1, 2).flatten(0, 1)
        return by_row.transpose(1, 2)[self._places]

    @property
    def _places(self) -> tuple["Tensor", "Tensor"]:
        import torch

        offsets = torch.cat([torch.arange(count, device=self.columns.device) for count in self.counts])
        return self.slots - self.first, offsets


def attend(
    current: PackedPass,
    query: "Tensor",
    keys: "Tensor",
    values: "Tensor",
    prefix: "tuple[Tensor, Tensor] | None",
    window: int | None,
    softcap: float | None,
) -> "Tensor":
    """Attention over the shared prefix and the rows' own tokens.

    Args:
        current: The rows and positions of the queries.
        query: (1, heads, tokens, size), already scaled.
        keys: The rows' own keys (rows, key heads, columns, size).
        values: As `keys`.
        prefix: Keys and values of the shared prefix (key heads, tokens, size), if there is one.
        window: The length of the layer's sliding window in tokens, if it has one.
        softcap: The layer's soft cap on scores, if it has one.

    Returns:
        (1, tokens, heads, size).
    """
    import torch

    by_row, shared = current.by_row(query[0]), prefix[0].shape[1] if prefix else 0
    out = []
    for part in current.parts:
        of_part, starts, ends = by_row[part], current.starts[part], current.ends[part]
        rows, heads, new, _ = of_part.shape
        most = MAX_SCORES.get(query.device.type, MAX_SCORES["cuda"])
        size = max(1, most // (rows * heads * (shared + max(ends))))
        chunks = []
        for first in range(0, new, size):
            queries = of_part[:, :, first : first + size]
            count = queries.shape[2]
            seen = max(min(start + first + count, end) for start, end in zip(starts, ends, strict=True))
            key = (window, part.start)
            if (masks := current.masks.get(key)) is None:
                masks = _masks(current.positions(part, first, count), seen, shared, window)
                if count == new:
                    current.masks[key] = masks
            own = keys[part, :, :seen], values[part, :, :seen]
            chunks.append(_attend(queries, own, prefix, masks, softcap))
        out.append(torch.cat(chunks, 2) if len(chunks) > 1 else chunks[0])
    return current.flat(torch.cat(out))[None]


def _attend(
    query: "Tensor",
    own: "tuple[Tensor, Tensor]",
    prefix: "tuple[Tensor, Tensor] | None",
    masks: "tuple[Tensor, Tensor | None]",
    softcap: float | None,
) -> "Tensor":
    """As `attend`, for some queries of some neighbouring rows.

    Query and result are (rows, heads, new, size), own keys and values (rows, key heads, seen, size), and the masks
    come from `_masks`.
    """
    import torch

    (keys, values), (own_mask, prefix_mask) = own, masks
    rows, heads, new, size = query.shape
    key_heads = keys.shape[1]
    grouped = query.reshape(rows, key_heads, -1, size)  # (rows, key heads, group * new, size)
    scores = _scores(grouped.flatten(0, 1), keys.flatten(0, 1), softcap).view(rows, heads, new, -1)
    scores = scores.add_(own_mask).view(rows, key_heads, heads // key_heads * new, -1)
    shared = prefix[0].shape[1] if prefix else 0
    if prefix:
        by_head = grouped.transpose(0, 1).reshape(key_heads, -1, size)
        start = _scores(by_head, prefix[0], softcap).view(key_heads, rows, -1, shared).transpose(0, 1)
        if prefix_mask is not None:
            start = (start.reshape(rows, heads, new, shared) + prefix_mask).view(start.shape)
        scores = torch.cat([start, scores], -1)
    weights = scores.softmax(-1).to(values.dtype)
    out = torch.bmm(weights[..., shared:].flatten(0, 1), values.flatten(0, 1)).view(rows, key_heads, -1, size)
    if prefix:
        by_head = weights[..., :shared].transpose(0, 1).reshape(key_heads, -1, shared)
        out += torch.bmm(by_head, prefix[1]).view(key_heads, rows, -1, size).transpose(0, 1)
    return out.view(rows, heads, new, -1)


def _masks(positions: "Tensor", seen: int, shared: int, window: int | None) -> tuple["Tensor", "Tensor | None"]:
    """The masks to add to scores: for own tokens (rows, 1, new, seen), and for the shared prefix (rows, 1, new, shared)
    if a sliding window may hide a part of it.

    Args:
        positions: (rows, new): the column of each query among its row's own tokens.
        seen: The number of own columns.
        shared: The length of the shared prefix.
        window: The length of the sliding window, if there is one.
    """
    import torch

    device, position = positions.device, positions[:, None, :, None]
    lowest, nothing = torch.finfo(torch.float32).min, torch.zeros(1, device=device)
    columns = torch.arange(seen, device=device)
    allowed, prefix_mask = columns <= position, None
    if window is not None:
        allowed &= columns > position - window
        start = torch.arange(shared, device=device) - shared
        prefix_mask = nothing.where(start > position - window, lowest)
    return nothing.where(allowed, lowest), prefix_mask


def _scores(query: "Tensor", keys: "Tensor", softcap: float | None) -> "Tensor":
    """Attention scores in float32 for any dtype of the model, as the softmax needs."""
    import torch

    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
