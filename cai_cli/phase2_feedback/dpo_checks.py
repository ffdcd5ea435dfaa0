"""Checks of the policy during `cai dpo`: its implicit rewards of held-out pairs, and its replies to their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.schema import JudgedPair, Prompt, conversation_id
from cai_cli.data.splits import pick_keys
from cai_cli.engines.base import Sampling
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.phase2_feedback.dpo_config import DpoConfig
from cai_cli.phase2_feedback.dpo_pairs import PromptedPair, held_out_rewards
from cai_cli.phase2_feedback.goodhart import weak_alarm
from cai_cli.phase2_feedback.monitor_models import MonitorModel
from cai_cli.phase2_feedback.rl_monitor import Monitor
from cai_cli.phase2_feedback.rl_prompts import fitting_prompts
from cai_cli.runtime.counts import Counts
from cai_cli.training import distributed
from cai_cli.training.config import TrainingConfig
from cai_cli.training.metrics_log import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_COLUMNS = ("held_out_loss", "held_out_accuracy", "held_out_margin")


def check_prompts(
    pairs: Sequence[PromptedPair], config: DpoConfig, base: Path, monitor_model: MonitorModel | None
) -> list[Prompt]:
    """Return the held-out prompts that the policy answers at each check.

    Args:
        pairs: The held-out pairs.
        config: The options of the stage.
        base: Directory of the policy.
        monitor_model: The monitor model, whose context window limits the prompts too.

    Raises:
        CaiError: An option needs such prompts, and there are none (`too-few-rows`).
        UsageError: An option needs the replies of a policy whose weights are sharded (`sharded-weights`).
    """
    if distributed.weights_are_sharded() and config.monitor_prompts:
        if config.needs_checks:
            raise UsageError(
                "the monitor needs the whole policy in one process, to sample replies",
                hint="--accelerate-config multi_gpu, zero1 or zero2; --lora takes less memory",
                code="sharded-weights",
            )
        console.say("dpo: no replies to held-out prompts are sampled, because the weights are sharded")
        return []
    scorers = [monitor_model.path] if monitor_model and monitor_model.path else []
    prompts = [prompt for pair in pairs if (prompt := _prompt_of(pair))]
    fitting = fitting_prompts(prompts, base, scorers, config.max_new_tokens, Counts.of_training([])) if prompts else []
    picked = pick_keys([prompt.id for prompt in fitting], config.monitor_prompts, config.seed)
    if config.needs_checks and not picked:
        raise CaiError(
            "dpo: the monitor has no held-out prompt that fits together with a reply",
            hint="use a larger --eval-share, more pairs, or a smaller --max-new-tokens",
            code="too-few-rows",
        )
    return [prompt for prompt in fitting if prompt.id in picked]


def _prompt_of(pair: PromptedPair) -> Prompt | None:
    """The prompt of a pair; None where it is not one that a user ends."""
    try:
        return Prompt(id=conversation_id(pair.row.prompt), prompt=pair.row.prompt, source=pair.row.source)
    except ValidationError:
        return None


def open_monitor(
    prompts: Sequence[Prompt],
    monitor_model: MonitorModel | None,
    tokenizer: "PreTrainedTokenizerBase",
    config: DpoConfig,
    training: TrainingConfig,
    *,
    rows: int,
    file: Path,
) -> Monitor | None:
    """Return the checks of the policy's replies; None without prompts.

    Args:
        prompts: The prompts of `check_prompts`.
        monitor_model: The monitor model, or None.
        tokenizer: The policy's tokenizer.
        config: The options of the stage.
        training: The options of the trainer.
        rows: Number of pairs to train on.
        file: Where the replies are written.
    """
    if not prompts:
        return None
    checks = -(-training.steps(rows) // config.monitor_every)
    if monitor_model and (warning := weak_alarm(len(prompts), checks)):
        console.warn(f"dpo: {warning}")
    return Monitor(
        prompts,
        tokenizer,
        (),
        monitor_model.open() if monitor_model and distributed.is_rank_zero() else None,
        file,
        Sampling(config.max_new_tokens, config.temperature),
        training.seed,
        2 * training.batch_size,  # a batch of pairs is as many replies
        checks,
        autocast=training.autocast,
        beta=config.beta,
        stage="dpo",
    )


@dataclass
class PairChecks:
    """Rewards the held-out pairs every few steps, and after the last one.

    Attributes:
        trainer: The trainer of the policy.
        pairs: The held-out pairs.
        metrics: Receives the metrics of each check.
        every: Steps between checks.
        judged: The rewards of the last check.
    """

    trainer: Any
    pairs: Sequence[PromptedPair]
    metrics: Metrics
    every: int
    judged: Sequence[JudgedPair] = field(default_factory=list)

    def callback(self) -> Any:
        """The callback to add to the trainer."""
        from transformers import TrainerCallback

        checks = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % checks.every == 0 or state.global_step >= state.max_steps:
                    checks.check(state.global_step)

        return Callback()

    def check(self, step: int) -> None:
        """Reward the held-out pairs after this step, and log the metrics."""
        self.judged = held_out_rewards(self.trainer, self.pairs)
        if self.judged:
            metrics = held_out_metrics(self.judged)
            accuracy = metrics["accuracy"]
            margin = fmean(pair.margin for pair in self.judged)
            values = (metrics["held_out_loss"], accuracy and accuracy["value"], margin)
            self.metrics.put(step, dict(zip(PAIR_COLUMNS, values, strict=True)))
