"""Log-probabilities of replies on a CPU, faster than TRL's fused head computes them there.

On a GPU the fused head is a Triton kernel. On a CPU it makes many passes over large temporary tensors, covers the
positions of the prompt too, and projects twice. Here the model's own forward projects only the positions from the first
reply token on, and autograd does the rest; the memory is that of the plain logits.
"""

import types
from typing import Any

from cai_cli.models.adapters import without_adapter_wrapper


def use_unfused_head(trainer: Any, temperature: float = 1.0, *, mean_logits: bool = False) -> None:
    """Make the models of a TRL trainer compute log-probabilities from plain logits, on CPU only.

    Args:
        trainer: A TRL trainer whose models have its fused head.
        temperature: The sampling temperature by which logits are divided.
        mean_logits: Whether the trainer logs the mean of the logits, as DPOTrainer does.
    """
    if trainer.args.device.type != "cpu":
        return
    policy = without_adapter_wrapper(trainer.model)
    for model in (policy, getattr(trainer, "ref_model", None)):
        if model is not None:
            _patch(model, temperature, mean_logits=mean_logits)


def _patch(model: Any, temperature: float, *, mean_logits: bool) -> None:
    """Replace the `model.forward` of TRL's `add_fused_lm_head` by one with the same results.

    `model(..., labels, fused_lm_head=True)` returns per-token `log_probs` (nats), `entropy` (nats, no gradient) and
    `is_top1`, each of shape (batch, length - 1), zero where the label of the next token is -100; on request also
    `mean_logits`, the mean over the vocabulary (no gradient).
    """
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    trl_forward, plain_forward = model.forward, type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("output_router_logits"):
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        targets = labels[:, 1:]
        mask = targets != -100
        labelled = mask.any(dim=0).nonzero()
        keep = int(targets.shape[1] - labelled[0]) if len(labelled) else 1
        # One position more than there are targets, because the last position has no next token.
        logits = plain_forward(self, *args, logits_to_keep=keep + 1, **kwargs).logits[:, :-1].float()
        kept = mask[:, -keep:]
        scaled = logits[kept] / temperature
        means = scaled.detach().mean(-1) if mean_logits else None
        log_p = torch.log_softmax(scaled, dim=-1)
        del scaled  # as large as the logits
        target_ids = targets[:, -keep:][kept]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
            top1 = log_p.argmax(-1) == target_ids

        def spread(values: Any) -> Any:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            log_probs=spread(log_p.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)),
            entropy=spread(entropy),
            mean_logits=None if means is None else spread(means),
            is_top1=spread(top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)
