"""Changes to TRL's RLOO and GRPO trainers for `cai rl`: the reward, the encoding of prompts and the sampling of
replies."""

from collections.abc import Callable
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from cai_cli.common.seeds import seed_for
from cai_cli.data.schema import Message, Prompt
from cai_cli.engines.base import Sampling
from cai_cli.engines.local.engine import engine_around
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.adapters import without_adapter_wrapper
from cai_cli.phase2_feedback.monitor_models import ReplyScorer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer
from cai_cli.training import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Chat = list[dict[str, str]]


def preference_reward(
    score: ReplyScorer, normalizer: RewardNormalizer, ends: frozenset[int], cutoff_penalty: float
) -> Callable[..., list[float]]:
    """The reward function for TRL's trainers (paper section 4.1).

    Args:
        score: The preference model.
        normalizer: Standardises its scores.
        ends: Token ids that end a reply; a reply that ends otherwise was cut off.
        cutoff_penalty: Subtracted from the standardised score of a reply that was cut off.
    """

    def reward(
        prompts: list[Chat],
        completions: list[Chat],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        rows = [Prompt(id="-", prompt=messages_of(prompt)) for prompt in prompts]
        scores = [normalizer(value) for value in score(rows, [reply[0]["content"] for reply in completions])]
        cut = [ids[-1] not in ends for ids in completion_ids]
        of_all = distributed.gathered(list(zip(scores, cut, strict=True)))
        log_metric("score", fmean(score for score, _ in of_all))
        log_metric("score_std", pstdev(score for score, _ in of_all))
        log_metric("cut_off_share", fmean(was_cut for _, was_cut in of_all))
        return [score - cutoff_penalty * was_cut for score, was_cut in zip(scores, cut, strict=True)]

    return reward


def messages_of(chat: Chat) -> list[Message]:
    """The messages of a chat as TRL passes it."""
    return [Message.model_validate(message) for message in chat]


def with_seeded_sampling(trainer_class: Any, ends: frozenset[int], sampling: Sampling, batch_size: int) -> Any:
    """A subclass of the trainer that encodes prompts and samples replies as `cai sample` does.

    Row text cannot become a control token. A reply's seed derives from (seed, step, index in the step), so replies do
    not depend on the number of processes or on the batches.

    Args:
        trainer_class: TRL's RLOOTrainer or GRPOTrainer.
        ends: Token ids that end a reply.
        sampling: How tokens are sampled.
        batch_size: Replies that one process samples at once.
    """

    class SeededSampling(trainer_class):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[Chat]) -> tuple[list[list[int]], None, dict[str, Any]]:
            encoded = [
                encode_chat(self._tokenizer, messages_of(prompt), add_generation_prompt=True) for prompt in prompts
            ]
            return encoded, None, {}

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
            first = distributed.rank() * len(prompt_ids)
            seeds = [
                seed_for(self.args.seed, "rl", self.state.global_step, first + index)
                for index in range(len(prompt_ids))
            ]
            policy = without_adapter_wrapper(self.accelerator.unwrap_model(self.model))
            was_training = policy.training
            policy.eval()
            engine = engine_around(policy, self._tokenizer, batch_size)
            engine.end_ids = set(ends)
            replies = engine.generate_ids(prompt_ids, seeds, sampling)
            policy.train(was_training)
            return (replies, None) if self._returns_log_probabilities else replies

        _returns_log_probabilities = trainer_class.__name__ == "GRPOTrainer"

    return SeededSampling


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The token ids that end a reply: the tokenizer's end token and those of the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))
