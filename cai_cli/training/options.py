"""The options that the training stages share."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cai_cli.models.loading import pick_device
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.shared_options import Device, RowInputOptions, RunOptions, SeedOptions
from cai_cli.training import launcher
from cai_cli.training.config import TrainingConfig

_TRAINING = Option(group=Group.TRAINING)
_HARMLESS = Option(Effect.HARMLESS, Group.TRAINING)


@dataclass(frozen=True)
class DefaultRates:
    """The learning rates of a stage where none is given.

    LoRA needs a higher rate: at the same rate adapters change the outputs of a model an order of magnitude less than
    full tuning does (`bench/lora_rates.py`).

    Attributes:
        full: The rate where all weights are trained.
        lora: The rate with `--lora`.
    """

    full: float
    lora: float

    @property
    def help(self) -> str:
        """The help of `--learning-rate`."""
        return f"Peak learning rate of AdamW; by default {self.full:g}, or {self.lora:g} with --lora."


class TrainerOptions(RunOptions, RowInputOptions, SeedOptions):
    """Options of every trainer."""

    output: str = option(
        ..., "Directory of the finished model.", Option(Effect.HARMLESS, Group.OUTPUT, flags=("--output", "-o"))
    )
    device: Device = option(Device.AUTO, "Device to train on.", Option(Effect.HARMLESS, Group.MODEL))
    default_rates: ClassVar[DefaultRates] = DefaultRates(full=2e-5, lora=2e-4)
    learning_rate: float | None = option(None, default_rates.help, _TRAINING, ge=0.0)
    lora: bool = option(
        False,
        "Train low-rank adapters, which are merged into the weights at the end, or train all weights.",
        Option(group=Group.TRAINING, flags=("--lora/--full",)),
    )
    lora_rank: int = option(16, "Rank of the adapters, with --lora.", _TRAINING, ge=1)
    save_steps: int = option(100, "Steps between checkpoints, from which an interrupted run resumes.", _HARMLESS, ge=1)
    accelerate_config: str | None = option(
        None,
        "Train in several processes through `accelerate launch`, with this config file or a config that TRL ships "
        "(multi_gpu, fsdp2, zero3, ...).",
        Option(Effect.HARMLESS, Group.TRAINING, metavar="NAME|FILE"),
    )
    num_processes: int | None = option(
        None, "Number of processes, instead of the config's; an error if another number is running.", _HARMLESS, ge=1
    )

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the default for what is trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.default_rates.lora if self.lora else self.default_rates.full

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output, with the learning rate that is used."""
        return super().settings(**{"learning_rate": self.peak_learning_rate, **resolved})

    def launch(self) -> None:
        """Replace this process by `accelerate launch` where that is requested, and check the number of processes.

        Raises:
            UsageError: The config is invalid, or the processes are running already.
            CaiError: Another number of processes is running (`process-count`).
        """
        launcher.launch(self.accelerate_config, self.num_processes)


class EpochOptions(TrainerOptions):
    """Options of the trainers that make passes over a file of rows."""

    epochs: float = option(1.0, "Number of passes over the rows.", _TRAINING, ge=0.0)
    max_steps: int | None = option(None, "Number of steps, instead of --epochs.", _TRAINING, ge=1)
    batch_size: int = option(4, "Rows in one forward pass of one process.", _TRAINING, ge=1)
    gradient_accumulation: int = option(2, "Forward passes of one process in each step.", _HARMLESS, ge=1)
    max_length: int = option(1024, "Longest row in tokens; longer rows are rejected, not truncated.", _TRAINING, ge=2)
    eval_share: float = option(0.05, "Share of the prompts held out for evaluation.", _TRAINING, ge=0.0, le=0.5)

    def training_config(self, **more: Any) -> TrainingConfig:
        """These options as a trainer takes them.

        Args:
            more: Further fields of TrainingConfig.

        Raises:
            CaiError: There is no such device.
        """
        return TrainingConfig(
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            learning_rate=self.peak_learning_rate,
            save_steps=self.save_steps,
            seed=self.seed,
            device=pick_device(self.device),
            lora_rank=self.lora_rank if self.lora else None,
            epochs=self.epochs,
            max_steps=self.max_steps,
            **more,
        )
