"""Rotary positions whose frequencies depend on the length of a row ("longrope", as in Phi-3 128k).

Such a model has one set of frequencies for rows up to a limit and another for longer rows. transformers takes one set
for a whole batch, by its longest row, so that a row's logits would depend on its neighbours. Rows on the two sides of a
limit are therefore run apart, with the frequencies held fixed.

"dynamic" positions change only in rows longer than `max_position_embeddings`, which is the context window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def rope_limits(model: Any) -> list[int]:
    """The row lengths in tokens up to which the model uses other frequencies than beyond, in ascending order."""
    return sorted({limit for _, _, limit in _long_ropes(model)})


def length_groups(lengths: list[int], limits: list[int]) -> Iterator[tuple[int | None, list[int]]]:
    """The indices of rows that may share a batch, with the limit of their lengths (None for the longest rows).

    >>> list(length_groups([5, 9, 4], [8]))
    [(8, [0, 2]), (None, [1])]
    """
    lower = 0
    for upper in [*limits, None]:
        if group := [i for i, length in enumerate(lengths) if lower < length and (upper is None or length <= upper)]:
            yield upper, group
        lower = upper or 0


@contextmanager
def fixed_rope(model: Any, limit: int | None) -> Iterator[None]:
    """Hold the frequencies that rows of up to `limit` tokens have (None: those of the longest rows)."""
    changed = []
    for module, layer_type, longest in _long_ropes(model):
        prefix = f"{layer_type}_" if layer_type else ""
        frequencies = getattr(module, f"{prefix}original_inv_freq")
        if limit is None or limit > longest:
            frequencies = _long_frequencies(module, layer_type, longest)
        getattr(module, f"{prefix}inv_freq").copy_(frequencies)
        changed.append((module, module.rope_type))
        module.rope_type = {**module.rope_type, layer_type: "default"} if layer_type else "default"
    try:
        yield
    finally:
        for module, rope_type in reversed(changed):
            module.rope_type = rope_type


def _long_ropes(model: Any) -> list[tuple[Any, str | None, int]]:
    """Each set of "longrope" positions: its module, its type of layer where a model has several, and its limit."""
    found: list[tuple[Any, str | None, int]] = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, kind in types.items() if isinstance(types, dict) else [(None, types)]:
            if kind == "longrope":
                settings = module.config.rope_parameters
                settings = settings[layer_type] if layer_type else settings
                found.append((module, layer_type, int(settings["original_max_position_embeddings"])))
    return found


def _long_frequencies(module: Any, layer_type: str | None, longest: int) -> "Tensor":
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies: Tensor
    device = module.inv_freq.device if layer_type is None else getattr(module, f"{layer_type}_inv_freq").device
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=longest + 1, layer_type=layer_type)
    return frequencies
