"""Mixing and splitting rows for training."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from cai_cli.common.seeds import seed_for

T = TypeVar("T")


def too_long_for(max_length: int, window: int) -> str:
    """Why a row of more tokens than either is rejected."""
    return "longer than --max-length" if max_length <= window else f"longer than the model's window of {window:,}"


def mixed(own: Sequence[T], others: Sequence[T], ratio: float, seed: int) -> list[T]:
    """`own` and, per one of them, `ratio` of the others drawn without replacement (all where there are fewer)."""
    wanted = round(ratio * len(own))
    if len(others) <= wanted:
        return [*own, *others]
    kept = sorted(random.Random(seed).sample(range(len(others)), wanted))  # noqa: S311
    return [*own, *(others[i] for i in kept)]


def held_out_keys(keys: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Which of the distinct `keys` are held out: `share` of them, at least one where there are twenty or more.

    The choice is by the hash of (seed, key): rows with one key stay together.
    """
    distinct = set(keys)
    count = int(share * len(distinct))
    if share > 0 and len(distinct) >= 20:
        count = max(1, count)
    return apart(distinct, count, seed)


def apart(keys: Iterable[str], count: int, seed: int) -> frozenset[str]:
    """`count` of `keys`, chosen by the hash of (seed, key)."""
    return frozenset(sorted(keys, key=lambda key: (seed_for(seed, "held-out", key), key))[:count])
