"""The options of `cai dpo`."""

from enum import StrEnum
from typing import Any, ClassVar

from cai_cli.common.errors import UsageError
from cai_cli.phase2_feedback.preference_data import PairOptions
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.runtime.config import option, redefine
from cai_cli.runtime.shared_options import EngineOptions, SamplingOptions
from cai_cli.training import distributed
from cai_cli.training.memory import Workload
from cai_cli.training.options import DefaultRates, TrainerOptions

LABEL_SMOOTHING = 0.1


class Loss(StrEnum):
    """The loss of a pair, by its name in TRL."""

    SIGMOID = "sigmoid"
    IPO = "ipo"
    ROBUST = "robust"


class DpoConfig(PairOptions):
    """Train a policy on comparisons, without a preference model (DPO).

    INPUT: Preference rows, from `cai label-prefs`, or labelled pairs in any format that `cai convert` reads. Writes
    a model directory, with the implicit rewards of the held-out pairs in `held_out.jsonl`.
    """

    loss: Loss = option(
        Loss.SIGMOID,
        "sigmoid (DPO), ipo (squared distance of the margin, in means over tokens, from 1 / (2 * --beta)) or robust "
        "(DPO corrected for labels that are wrong with probability --label-smoothing).",
    )
    beta: float = option(
        0.1,
        "Weight of the KL divergence from --model: the implicit reward of a reply is beta times its log-ratio.",
        ge=1e-6,
    )
    label_smoothing: float | None = option(
        None,
        f"With --loss robust: the probability that a label is wrong, below 0.5; by default {LABEL_SMOOTHING}.",
        ge=0.0,
        le=0.49,
    )
    nll: float = option(
        0.0,
        "Weight of the negative log-likelihood per token of the preferred reply, which keeps its probability from "
        "falling.",
        ge=0.0,
    )
    monitor_prompts: int = option(32, "Held-out prompts that the policy answers at each check; 0 for none.", ge=0)
    monitor_every: int = redefine(
        RlConfig, "monitor_every", 50, "Steps between checks of the policy on the held-out pairs and prompts."
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 128, "Longest reply of a check, in tokens.")
    temperature: float = redefine(RlConfig, "temperature", 1.0)
    monitor_pm: str | None = redefine(
        RlConfig, "monitor_pm", None, "A preference model that scores the replies of the checks."
    )
    monitor_judge: str | None = redefine(
        RlConfig,
        "monitor_judge",
        None,
        "A judge that compares the replies of the checks with those of --model, under the shipped principles.",
    )
    base_url: list[str] | None = redefine(EngineOptions, "base_url", None)
    stop_on_goodhart: bool = redefine(RlConfig, "stop_on_goodhart", False)
    default_rates: ClassVar[DefaultRates] = DefaultRates(full=1e-6, lora=2e-5)
    learning_rate: float | None = redefine(TrainerOptions, "learning_rate", None, default_rates.help)

    @property
    def needs_checks(self) -> bool:
        """Whether an option needs replies to held-out prompts."""
        return bool(self.monitor_pm or self.monitor_judge or self.stop_on_goodhart)

    @property
    def smoothing(self) -> float:
        """`label_smoothing`, or its default; 0 with the losses that have none."""
        if self.loss is not Loss.ROBUST:
            return 0.0
        return LABEL_SMOOTHING if self.label_smoothing is None else self.label_smoothing

    def workload(self, length: int) -> Workload:
        # Training needs no reference model, but the checks of replies do, and TRL keeps it under FSDP.
        reference = bool(self.monitor_prompts and self.eval_share) or distributed.weights_are_sharded()
        return Workload(length, sequences=2, scored=length, reference=reference)

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output, with the label smoothing that is used."""
        return super().settings(**{"label_smoothing": self.smoothing, **resolved})

    def check(self) -> None:
        super().check()
        if not (self.epochs or self.max_steps):
            raise UsageError("--epochs 0 trains nothing", code="option-conflict")
        if self.needs_checks and not (self.monitor_prompts and self.eval_share):
            raise UsageError(
                "a monitor needs the policy's replies to held-out prompts",
                hint="--monitor-prompts and --eval-share above 0",
                code="option-conflict",
            )
        if self.label_smoothing is not None and self.loss is not Loss.ROBUST:
            raise UsageError("--label-smoothing is an option of --loss robust", code="option-conflict")
