"""Changes to TRL's RLOO and GRPO trainers for `cai rl`: the encoding of prompts and the sampling of replies."""

import math
from functools import cached_property
from typing import Any

from cai_cli.common.library_errors import library_failures
from cai_cli.common.seeds import seed_for
from cai_cli.engines.base import Sampling
from cai_cli.engines.local.model_in_training import engine_around
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.adapters import without_adapter_wrapper
from cai_cli.phase2_feedback.rl_rewards import Chat, messages_of
from cai_cli.training import distributed
from cai_cli.training.sharding import whole_weights

_SAMPLING = "cai_sampling_logprobs"  # in the inputs of the loss


class SamplingDifference:
    """How far the log-probabilities that a forward pass in training gives to the tokens of replies are from those with
    which they were sampled. They are equal where both compute in the same way; a policy gradient without an importance
    ratio assumes that.

    The mean of the ratio pi_train / pi_sample would not show a difference: its expectation over sampled tokens is 1
    whatever pi_train is.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[float, int, float]] = []  # of each forward pass: sum, count and largest log-ratio

    def add(self, trained: Any, sampled: Any, mask: Any) -> None:
        """Add the tokens of one forward pass.

        Args:
            trained: Log-probabilities (rows, tokens) in training.
            sampled: Those in sampling.
            mask: 1 where there is a token of a reply.
        """
        log_ratios = (trained.detach().float() - sampled)[mask.bool() & sampled.isfinite()]
        if log_ratios.numel():
            self._parts.append((float(log_ratios.abs().sum()), log_ratios.numel(), float(log_ratios.max())))

    def take(self) -> dict[str, float]:
        """The mean absolute difference in nats and the largest ratio pi_train / pi_sample, over the tokens of all
        processes since the last call; empty without tokens. Called on every rank."""
        parts, self._parts = distributed.gathered(self._parts), []
        if not parts:
            return {}
        mean = sum(total for total, _, _ in parts) / sum(count for _, count, _ in parts)
        largest = max(log_ratio for _, _, log_ratio in parts)
        return {"sampling_logp_difference": mean, "importance_ratio_max": math.exp(largest)}


def _padded(rows: list[list[float]], like: Any) -> Any:
    """The rows as a tensor (rows, tokens) as wide as `like`, with zeros after their ends."""
    import torch

    values = [row + [0.0] * (like.shape[1] - len(row)) for row in rows]
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(len(rows), -1)


def with_seeded_sampling(trainer_class: Any, sampling: Sampling, batch_size: int | None) -> Any:
    """A subclass of the trainer that encodes prompts and samples replies as `cai sample` does.

    A reply's seed derives from (seed, step, index in the step), so replies do not depend on the number of processes or
    on the batches. They are sampled in the precision of training, which the model inside an adapter's wrapper would not
    have by itself; `SamplingDifference` states what difference remains.

    Args:
        trainer_class: TRL's RLOOTrainer or GRPOTrainer.
        sampling: How tokens are sampled.
        batch_size: Replies that one process samples at once; None for the default of the local engine.
    """
    returns_logprobs = trainer_class.__name__ == "GRPOTrainer"

    class SeededSampling(_with_encoded_prompts(trainer_class)):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
            first = distributed.rank() * len(prompt_ids)
            seeds = [
                seed_for(self.args.seed, "rl", self.state.global_step, first + index)
                for index in range(len(prompt_ids))
            ]
            with whole_weights(self) as model, self.accelerator.autocast():
                policy = without_adapter_wrapper(model)
                with engine_around(
                    policy, self._tokenizer, batch_size, sharded=distributed.weights_are_sharded()
                ) as engine:
                    replies, self._sampling_logprobs = engine.generate_ids(prompt_ids, seeds, sampling)
            return (replies, None) if returns_logprobs else replies

    return _with_sampling_difference(SeededSampling)


def with_vllm_sampling(trainer_class: Any) -> Any:
    """A subclass of the trainer that encodes prompts as `cai sample` does and has TRL sample the replies with vLLM.

    vLLM computes other log-probabilities than training does, so each reply is weighted by its importance ratio, the
    probability in training over that in vLLM, or by 0 where the ratio is above TRL's limit. TRL does so under GRPO
    (`vllm_importance_sampling_mode="sequence_mask"`); here RLOO does the same.

    Args:
        trainer_class: TRL's RLOOTrainer or GRPOTrainer, which is given `use_vllm`.
    """
    is_grpo = trainer_class.__name__ == "GRPOTrainer"

    class VllmSampling(_with_encoded_prompts(trainer_class)):  # type: ignore[misc]
        _last_loaded_step: int  # TRL's: the step whose weights vLLM has

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
            with library_failures("vllm"):
                if self.state.global_step != self._last_loaded_step:
                    self.vllm_generation.sync_weights()
                    self._last_loaded_step = self.state.global_step
                self.vllm_generation.logprobs = 0  # of the sampled token alone, which RLOO does not request
                _, replies, logprobs, _ = self.vllm_generation.generate(prompt_ids, None, self.num_generations)
            # vLLM's logprobs that are not numbers arrive as None.
            self._sampling_logprobs = [[math.nan if at[0] is None else at[0] for at in reply] for reply in logprobs]
            return (replies, self._sampling_logprobs) if is_grpo else replies

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if not is_grpo:
                sampled = _padded(self._sampling_logprobs, output["completion_ids"]).sum(1)
                weights = importance_weights(output["old_logps"] - sampled)
                output["advantages"] = output["advantages"] * weights
                mean = self.accelerator.gather(weights).mean().item()
                self._metrics["train"]["sampling/importance_sampling_ratio/mean"].append(mean)
            return output

    return _with_sampling_difference(VllmSampling)


def importance_weights(log_ratios: Any) -> Any:
    """The weight of each reply, as TRL computes it under GRPO with `sequence_mask`.

    Args:
        log_ratios: The log-probability of each reply in training minus that in sampling; NaN where it is unknown.

    Returns:
        The ratios; 0 where the ratio is above TRL's limit, 1 where it is unknown.
    """
    from trl import GRPOConfig

    ratios = log_ratios.nan_to_num(nan=0.0).exp()
    return ratios.masked_fill(ratios > GRPOConfig.vllm_importance_sampling_clip_max, 0.0)


def _with_encoded_prompts(trainer_class: Any) -> Any:
    """A subclass of the trainer that encodes prompts as `cai sample` does: row text cannot become a control token."""

    class EncodedPrompts(trainer_class):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[Chat]) -> tuple[list[list[int]], None, dict[str, Any]]:
            encoded = [
                encode_chat(self._tokenizer, messages_of(prompt), add_generation_prompt=True) for prompt in prompts
            ]
            return encoded, None, {}

    return EncodedPrompts


def _with_sampling_difference(trainer_class: Any) -> Any:
    """A subclass of the trainer that logs `SamplingDifference`.

    The log-probabilities of sampling (`_sampling_logprobs`) travel with their replies to the forward pass of the loss.
    """

    class Logging(trainer_class):  # type: ignore[misc]
        _sampled: Any = None  # log-probabilities of sampling and the mask of their tokens, within the loss

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            output[_SAMPLING] = _padded(self._sampling_logprobs, output["completion_ids"])
            return output

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            self._sampled = inputs[_SAMPLING], inputs["completion_mask"]
            try:
                return super()._compute_loss(model, inputs)
            finally:
                self._sampled = None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self._sampled is not None:
                self._difference.add(output[0], *self._sampled)
            return output

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, **self._difference.take()}, *args, **kwargs)

        @cached_property
        def _difference(self) -> SamplingDifference:
            return SamplingDifference()

    return Logging
