"""Mixes and splits rows for training."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from cai_cli.common.seeds import seed_for
from cai_cli.data.schema import Message

T = TypeVar("T")


def too_long_for(max_length: int, window: int) -> str:
    """The reason for which rows that are too long are rejected.

    Args:
        max_length: `--max-length` in tokens.
        window: The model's context window in tokens.

    >>> too_long_for(512, 2048)
    'longer than --max-length'
    """
    return "longer than --max-length" if max_length <= window else f"longer than the model's window of {window:,}"


EMPTY_REPLY, IDENTICAL_REPLIES = "empty reply", "identical replies"


def pair_problem(one: Sequence[Message], other: Sequence[Message]) -> str | None:
    """The reason for which no preference can be learned from two replies; None where one can.

    White space around a reply does not count, because it is neither sampled nor scored.

    >>> pair_problem([Message(role="assistant", content="Yes.")], [Message(role="assistant", content="Yes. ")])
    'identical replies'
    """
    texts = ["".join(message.content for message in reply).strip() for reply in (one, other)]
    if not all(texts):
        return EMPTY_REPLY
    return IDENTICAL_REPLIES if texts[0] == texts[1] else None


def mixed(own: Sequence[T], others: Sequence[T], ratio: float, seed: int) -> list[T]:
    """`own` followed by a random sample of `others`, in their order.

    Args:
        own: Rows that are all kept.
        others: Rows to sample from without replacement.
        ratio: Sampled rows for each row of `own`; all of `others` are taken where they are fewer.
        seed: Random seed.

    >>> mixed(["a", "b"], ["x", "y", "z"], ratio=0.5, seed=0)
    ['a', 'b', 'y']
    """
    count = round(min(ratio * len(own), float(len(others))))  # a product beyond every float is infinite
    if len(others) <= count:
        return [*own, *others]
    kept = sorted(random.Random(seed).sample(range(len(others)), count))  # noqa: S311
    return [*own, *(others[i] for i in kept)]


def held_out_keys(keys: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The keys of the rows to hold out from training.

    The hash of (seed, key) decides, so rows with the same key stay together.

    Args:
        keys: The keys of the rows, with repeats.
        share: Share of the distinct keys to hold out, from 0 to 1; at least one of twenty or more keys is held out.
        seed: Random seed.

    >>> sorted(held_out_keys([f"p{i}" for i in range(20)], share=0.1, seed=0))
    ['p10', 'p8']
    """
    distinct = set(keys)
    count = int(share * len(distinct))
    if share > 0 and len(distinct) >= 20:
        count = max(1, count)
    return pick_keys(distinct, count, seed)


def pick_keys(keys: Iterable[str], count: int, seed: int) -> frozenset[str]:
    """`count` of the keys, chosen by the hash of (seed, key)."""
    return frozenset(sorted(keys, key=lambda key: (seed_for(seed, "held-out", key), key))[:count])
