"""TRL's RewardTrainer with soft labels, batches of similar length, and packed pairs (paper section 4.1)."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from cai_cli.common.seeds import seed_for
from cai_cli.reward.packed_pairs import collate, packed

POOL = 16  # batches per pool, within which rows are sorted by length


def by_length(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, stage: str = "train-pm") -> list[int]:
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
        >>> order = by_length([5, 1, 4, 2], batch_size=2, seed=0, epoch=0)
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


def length_sampler() -> Any:
    """Return the class of a sampler that draws batches of similar length, in a new order for every epoch."""
    from torch.utils.data import Sampler

    class ByLength(Sampler[int]):
        def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, stage: str) -> None:
            self.lengths, self.batch_size, self.seed, self.stage, self.epoch = lengths, batch_size, seed, stage, 0

        def set_epoch(self, epoch: int) -> None:  # accelerate calls it, also in a resumed run
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            return iter(by_length(self.lengths, self.batch_size, self.seed, self.epoch, self.stage))

    return ByLength


def _collator(*, share_prompts: bool) -> Any:
    """Return the class of a collator that keeps `p_chosen` and, with `share_prompts`, packs the pairs."""
    import torch
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            if share_prompts:
                pairs = [packed(example["chosen_ids"], example["rejected_ids"]) for example in examples]
                batch = collate(pairs, self.pad_token_id)
            else:
                batch = super().torch_call(examples)
            return {**batch, "p_chosen": torch.tensor([example["p_chosen"] for example in examples])}

    return Collator


def soft_reward_trainer(*, share_prompts: bool) -> Any:
    """Return a RewardTrainer class for soft labels.

    Its rows have `chosen_ids`, `rejected_ids` and `p_chosen`, the probability that `chosen` is better.

    Args:
        share_prompts: Whether to pack pairs; the model must accept them (`packed_pairs.enable_packed_pairs`).
    """
    import torch
    from trl import RewardTrainer

    collator_class, sampler_class = _collator(share_prompts=share_prompts), length_sampler()

    class SoftRewardTrainer(RewardTrainer):  # type: ignore[misc]
        loss_is_scaled_for_ga = False  # a mean over the batch

        def __init__(self, *, processing_class: Any, **arguments: Any) -> None:
            collator = collator_class(pad_token_id=processing_class.pad_token_id)
            super().__init__(processing_class=processing_class, data_collator=collator, **arguments)

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "p_chosen"]

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = zip(self.train_dataset["chosen_ids"], self.train_dataset["rejected_ids"], strict=True)
            lengths = [max(len(chosen), len(rejected)) for chosen, rejected in rows]
            return sampler_class(lengths, self.args.train_batch_size, self.args.seed, "train-pm")

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            p_chosen = inputs.pop("p_chosen")
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
            # -log sigmoid(d) + (1 - p) d  =  -p log sigmoid(d) - (1 - p) log sigmoid(-d)
            loss = loss + ((1 - p_chosen) * (chosen - rejected)).mean()
            return (loss, outputs) if return_outputs else loss

    return SoftRewardTrainer
