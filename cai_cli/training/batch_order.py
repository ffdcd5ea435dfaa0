"""The order in which trainers take their rows: batches of similar length, which have little padding.

The order derives from the seed, the stage and the epoch alone. So it is that of the interrupted run after a resume, and
does not depend on the number of processes.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from cai_cli.common.seeds import seed_for

POOL = 16  # batches per pool, within which rows are sorted by length


def similar_lengths(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, stage: str) -> list[int]:
    """Return all indices in an order in which each batch has sequences of similar length.

    Rows are drawn into pools and sorted by length only within a pool, and the batches of all pools are shuffled. So
    batches differ between epochs, and long sequences are spread over the epoch.

    Args:
        lengths: Length of each row in tokens.
        batch_size: Number of rows in a batch.
        seed: Random seed of the run.
        epoch: Number of the epoch.
        stage: The stage, from which the order derives too.

    Examples:
        >>> order = similar_lengths([5, 1, 4, 2], batch_size=2, seed=0, epoch=0, stage="sft")
        >>> sorted([sorted(order[:2]), sorted(order[2:])])
        [[0, 2], [1, 3]]
    """
    rng = random.Random(seed_for(seed, stage, "order", epoch))  # noqa: S311
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda i: lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    incomplete = [batches.pop(i) for i in reversed(range(len(batches))) if len(batches[i]) < batch_size]
    rng.shuffle(batches)
    return [i for batch in (*batches, *incomplete) for i in batch]


def sampler_class() -> Any:
    """Return the class of a sampler that draws batches of similar length, in a new order for every epoch."""
    from torch.utils.data import Sampler

    class SimilarLengths(Sampler[int]):
        def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, stage: str) -> None:
            self.lengths, self.batch_size, self.seed, self.stage, self.epoch = lengths, batch_size, seed, stage, 0

        def set_epoch(self, epoch: int) -> None:  # accelerate calls it, and in a resumed run `fit` does
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            return iter(similar_lengths(self.lengths, self.batch_size, self.seed, self.epoch, self.stage))

    return SimilarLengths
