"""TRL's RewardTrainer with soft labels, batches of similar length, and packed pairs (paper section 4.1)."""

from typing import Any

from cai_cli.reward.packed_pairs import collate, packed
from cai_cli.training.batch_order import sampler_class


def _collator(*, share_prompts: bool) -> Any:
    """Return the class of a collator that keeps `p_chosen` and, as long as `packs_pairs` is set, packs the pairs."""
    import torch
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        packs_pairs = share_prompts

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            if self.packs_pairs:
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

    collator_class, by_length = _collator(share_prompts=share_prompts), sampler_class()

    class SoftRewardTrainer(RewardTrainer):  # type: ignore[misc]
        loss_is_scaled_for_ga = False  # a mean over the batch

        def __init__(self, *, processing_class: Any, **arguments: Any) -> None:
            collator = collator_class(pad_token_id=processing_class.pad_token_id)
            super().__init__(processing_class=processing_class, data_collator=collator, **arguments)
            for name, parameter in self.model.named_parameters():
                if "modules_to_save" in name:  # the head, which TRL rounds with the adapters of a 4-bit model
                    parameter.data = parameter.data.float()

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "p_chosen"]

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = zip(self.train_dataset["chosen_ids"], self.train_dataset["rejected_ids"], strict=True)
            lengths = [max(len(chosen), len(rejected)) for chosen, rejected in rows]
            return by_length(lengths, self.args.train_batch_size, self.args.seed, "train-pm")

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
