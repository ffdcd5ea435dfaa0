"""TRL's DPOTrainer with soft labels and a likelihood term.

The loss of a pair with label p is the mean of its loss and that of the exchanged pair, weighted by p and 1 - p: what
the hard labels of many judges would give who prefer `chosen` with probability p. TRL computes the loss of the pair. For
each of the losses here, that of the exchanged pair differs from it by a term that is linear in the log-ratios
(`exchange`), so adding (1 - p) times this term is exact.

The reference log-probabilities are computed before the first step, by TRL (`precompute_ref_log_probs`): once for each
pair, whatever the number of epochs. TRL then frees the reference model, except under FSDP. With adapters on sharded
weights they are computed in every step instead, because the weights are whole in no process before the first.
"""

from typing import Any

from cai_cli.training.batch_order import sampler_class
from cai_cli.training.cpu_logprobs import use_unfused_head

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "p_chosen", "ref_chosen_logps", "ref_rejected_logps")


def exchange(loss: str, beta: float, label_smoothing: float, log_ratios: Any, tokens: Any) -> Any:
    """Return the loss of each exchanged pair less that of the pair, for a loss of TRL's DPOTrainer.

    Args:
        loss: `loss_type` of TRL: sigmoid, robust or ipo.
        beta: `beta` of TRL.
        label_smoothing: `label_smoothing` of TRL.
        log_ratios: log pi(reply) / pi_ref(reply) in nats, shape (2, pairs), those of the chosen replies first.
        tokens: The lengths of the replies, in the same shape.
    """
    if loss == "ipo":  # (h + 1/2 beta)^2 - (h - 1/2 beta)^2, where h is a difference of means over tokens
        chosen, rejected = log_ratios / tokens
        return 2 * (chosen - rejected) / beta
    chosen, rejected = log_ratios
    # -log sigmoid(-d) + log sigmoid(d) = d; the robust loss is a sum of such terms, divided by 1 - 2 * label_smoothing.
    return beta * (chosen - rejected) / (1 - 2 * label_smoothing * (loss == "robust"))


def _collator() -> Any:
    """Return the class of a collator that keeps `p_chosen`."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            return {**batch, "p_chosen": torch.tensor([example["p_chosen"] for example in examples])}

    return Collator


def soft_dpo_trainer(nll: float) -> Any:
    """Return a DPOTrainer class for soft labels.

    Its rows have `prompt_ids`, `chosen_ids`, `rejected_ids` and `p_chosen`, the probability that `chosen` is better.
    Its predictions are the implicit rewards of both replies, shape (pairs, 2), and its label ids are `p_chosen`.

    Args:
        nll: Weight of the negative log-likelihood of the replies, a mean over tokens, weighted by p and 1 - p too.
    """
    import torch
    from trl import DPOTrainer

    collator_class, by_length = _collator(), sampler_class()

    class SoftDPOTrainer(DPOTrainer):  # type: ignore[misc]
        _implicit_rewards: Any = None  # of the last batch, shape (2, pairs)
        precompute_ref_logps: bool

        def __init__(self, *, processing_class: Any, **arguments: Any) -> None:
            collator = collator_class(pad_token_id=processing_class.pad_token_id)
            super().__init__(processing_class=processing_class, data_collator=collator, **arguments)
            if not self.precompute_ref_logps:
                use_unfused_head(self, mean_logits=True)
                self.precompute_ref_logps = True  # `_compute_loss` gives them to TRL's

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # rows are encoded already
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = list(COLUMNS)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            columns = (self.train_dataset[name] for name in COLUMNS[:3])
            lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
            return by_length(lengths, self.args.train_batch_size, self.args.seed, "dpo")

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            if name == "train":  # first; here because all log-probabilities must be computed in the same way
                use_unfused_head(self, mean_logits=True)
            return super()._precompute_ref_logps(dataset, name, batch_size)

        def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "p_chosen"})

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            inputs = dict(inputs)
            p_chosen = inputs.pop("p_chosen")
            if "ref_chosen_logps" not in inputs:
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(model, inputs)
            seen: list[Any] = []

            def policy(**arguments: Any) -> Any:
                seen.append(model(**arguments))
                return seen[-1]

            loss = super()._compute_loss(policy, inputs, False)
            log_probs = torch.stack(seen[0].log_probs.sum(1).chunk(2))
            tokens = torch.stack(inputs["completion_mask"].sum(1).chunk(2))
            log_ratios = log_probs - torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            exchanged = exchange(self.loss_types[0], self.beta, self.label_smoothing, log_ratios, tokens)
            likelihood = -(torch.stack([p_chosen, 1 - p_chosen]) * log_probs / tokens).sum(0).mean()
            loss = loss + ((1 - p_chosen) * exchanged).mean() + nll * likelihood
            self._implicit_rewards = self.beta * log_ratios.detach()
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["nll"].append(self.accelerator.gather(likelihood.detach()).mean().item())
            return (loss, seen[0]) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            return loss, self._implicit_rewards.T.contiguous(), inputs["p_chosen"]

    return SoftDPOTrainer
