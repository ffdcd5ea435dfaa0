"""The options of `cai dpo`."""

from enum import StrEnum
from typing import Any, ClassVar

from cai_cli.common.errors import UsageError
from cai_cli.phase2_feedback.preference_data import PairOptions
from cai_cli.runtime.config import Option, option, redefine
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

    hard: bool = option(
        False,
        "Train on 1 for the preferred reply instead of the probabilities of the labels; ties are skipped.",
        Option(flags=("--hard",)),
    )
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
    default_rates: ClassVar[DefaultRates] = DefaultRates(full=1e-6, lora=2e-5)
    learning_rate: float | None = redefine(TrainerOptions, "learning_rate", None, default_rates.help)

    @property
    def smoothing(self) -> float:
        """`label_smoothing`, or its default; 0 with the losses that have none."""
        if self.loss is not Loss.ROBUST:
            return 0.0
        return LABEL_SMOOTHING if self.label_smoothing is None else self.label_smoothing

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output, with the label smoothing that is used."""
        return super().settings(**{"label_smoothing": self.smoothing, **resolved})

    def check(self) -> None:
        super().check()
        if not (self.epochs or self.max_steps):
            raise UsageError("--epochs 0 trains nothing", code="option-conflict")
        if self.soft_from and self.hard:
            raise UsageError("--soft-from excludes --hard", hint="give one of them", code="option-conflict")
        if self.label_smoothing is not None and self.loss is not Loss.ROBUST:
            raise UsageError("--label-smoothing is an option of --loss robust", code="option-conflict")
