"""The options that the training stages share."""

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.loading import pick_device
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.shared_options import ChatTemplateOptions, Device, RowInputOptions, RunOptions, SeedOptions
from cai_cli.training import launcher, trackers
from cai_cli.training.config import TrainingConfig
from cai_cli.training.memory import Workload

_TRAINING = Option(group=Group.TRAINING)
_HARMLESS = Option(Effect.HARMLESS, Group.TRAINING)


class Precision(StrEnum):
    """A precision of training: that of the passes, or that in which weights are held in memory."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Checkpointing(StrEnum):
    """Whether activations are computed again in the backward pass; auto is on with CUDA."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Quantize(StrEnum):
    """The precision to which the frozen weights under adapters are quantised."""

    FOUR_BIT = "4bit"


class Attention(StrEnum):
    """The implementation of attention, by its name in transformers."""

    AUTO = "auto"
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"


class Optimizer(StrEnum):
    """The optimiser. All are AdamW; those with 8 bits store its state in a quarter of the memory."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw-8bit"
    PAGED_ADAMW_8BIT = "paged-adamw-8bit"


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


class TrainerOptions(RunOptions, RowInputOptions, SeedOptions, ChatTemplateOptions):
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
    keep_adapter: bool = option(
        False,
        "With --lora: write the adapter to OUT/adapter too, beside the merged weights.",
        Option(group=Group.TRAINING, flags=("--keep-adapter",)),
    )
    dtype: Precision = option(
        Precision.AUTO,
        "Precision of the forward and backward passes, whatever that of the weights; auto is float32 on a CPU, "
        "bfloat16 on a GPU.",
        _TRAINING,
    )
    weights: Precision = option(
        Precision.AUTO,
        "Precision in which the weights are held; adapters are float32. auto: float32 on a CPU; on a GPU "
        "bfloat16 for weights that are not trained (under --lora, and of a reference model), else float32.",
        _TRAINING,
    )
    gradient_checkpointing: Checkpointing = option(
        Checkpointing.AUTO,
        "Compute activations again in the backward pass instead of keeping them: less memory, more time. auto is on "
        "with CUDA.",
        _HARMLESS,
    )
    quantize: Quantize | None = option(
        None,
        "With --lora: hold the frozen weights in 4 bits and the adapters in bfloat16 (QLoRA). The adapters are merged "
        "into the original weights.",
        _TRAINING,
    )
    attention: Attention = option(
        Attention.AUTO, "Implementation of attention; auto takes that of transformers (sdpa).", _HARMLESS
    )
    optimizer: Optimizer = option(
        Optimizer.ADAMW, "AdamW with its state in float32 (fused), in 8 bits, or in 8 bits in paged memory.", _TRAINING
    )
    liger: bool = option(
        False,
        "Use the kernels of Liger for the layers that they cover, on a GPU.",
        Option(Effect.HARMLESS, Group.TRAINING, flags=("--liger",)),
    )
    report_to: trackers.Tracker | None = option(
        None,
        "Also log every metric of metrics.jsonl to this experiment tracker.",
        Option(Effect.HARMLESS, Group.OUTPUT),
    )
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

    @property
    def processes(self) -> int:
        """The number of processes that the options request. Raises UsageError."""
        return launcher.group_size(self.accelerate_config, self.num_processes)

    @property
    def has_adapter(self) -> bool:
        """Whether what is trained can be written as an adapter of PEFT."""
        return self.lora

    @property
    def adapter_needs(self) -> str:
        """The options with which `has_adapter` holds, for messages."""
        return "--lora"

    def check(self) -> None:
        super().check()
        if self.quantize and not self.lora:
            raise UsageError(
                "--quantize needs --lora, because quantised weights cannot be trained", code="option-conflict"
            )
        if self.keep_adapter and not self.has_adapter:
            raise UsageError(f"--keep-adapter needs {self.adapter_needs}", code="option-conflict")
        _need_package("bitsandbytes", f"--quantize {self.quantize}" if self.quantize else "", extra="quantize")
        eight_bit = self.optimizer is not Optimizer.ADAMW
        _need_package("bitsandbytes", f"--optimizer {self.optimizer}" if eight_bit else "", extra="quantize")
        _need_package("liger_kernel", "--liger" if self.liger else "", extra="liger")
        package = {Attention.FLASH_ATTENTION_2: "flash_attn", Attention.FLASH_ATTENTION_3: "flash_attn_interface"}
        if self.attention in package:
            _need_package(package[self.attention], f"--attention {self.attention}")
        trackers.check_installed(self.report_to)

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output, with the learning rate that is used."""
        return super().settings(**{"learning_rate": self.peak_learning_rate, **resolved})

    def memory_options(self, device: str) -> dict[str, Any]:
        """The fields of TrainingConfig that decide how much memory training takes.

        Args:
            device: The device to train on, "cpu" or "cuda".

        Raises:
            CaiError: An option needs CUDA (`no-device`).
        """
        needs_cuda = {
            "--liger": self.liger,
            f"--attention {self.attention}": self.attention.startswith("flash"),
            f"--optimizer {self.optimizer}": self.optimizer is Optimizer.PAGED_ADAMW_8BIT,
        }
        for name in (name for name, given in needs_cuda.items() if given and device != "cuda"):
            raise CaiError(f"{name} needs a CUDA device", hint="leave it out on a CPU", code="no-device")
        return {
            "dtype": self.dtype.value,
            "weights": self.weights.value,
            "gradient_checkpointing": self.gradient_checkpointing.value,
            "quantize": self.quantize and self.quantize.value,
            "attention": None if self.attention is Attention.AUTO else self.attention.value,
            "optimizer": self.optimizer.value,
            "liger": self.liger,
        }

    def launch(self) -> None:
        """Replace this process by `accelerate launch` where that is requested, check the number of processes, and name
        the project of the tracker.

        Raises:
            UsageError: The config is invalid, or the processes are running already.
            CaiError: Another number of processes is running (`process-count`).
        """
        launcher.launch(self.accelerate_config, self.num_processes)
        trackers.name_project(self.report_to, Path(self.output))


class EpochOptions(TrainerOptions):
    """Options of the trainers that make passes over a file of rows."""

    epochs: float = option(1.0, "Number of passes over the rows.", _TRAINING, ge=0.0)
    max_steps: int | None = option(None, "Number of steps, instead of --epochs.", _TRAINING, ge=1)
    batch_size: int = option(4, "Rows in one forward pass of one process.", _TRAINING, ge=1)
    gradient_accumulation: int = option(2, "Forward passes of one process in each step.", _HARMLESS, ge=1)
    max_length: int = option(1024, "Longest row in tokens; longer rows are rejected, not truncated.", _TRAINING, ge=2)
    eval_share: float = option(0.05, "Share of the prompts held out for evaluation.", _TRAINING, ge=0.0, le=0.5)

    def trained_rows(self, rows: float) -> float:
        """The rows that all steps train on, each as often as it is trained on.

        Args:
            rows: The rows of one epoch.
        """
        if self.max_steps is None:
            return self.epochs * rows
        return self.max_steps * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        """The rows of one step, in all processes together."""
        return self.batch_size * self.gradient_accumulation * self.processes

    def workload(self, length: int) -> Workload:
        """What training does with its model, as far as memory depends on it.

        Args:
            length: Tokens of the longest row.
        """
        return Workload(length, scored=length)

    def training_config(self) -> TrainingConfig:
        """These options as a trainer takes them.

        Raises:
            CaiError: There is no such device.
        """
        device = pick_device(self.device)
        return TrainingConfig(
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            learning_rate=self.peak_learning_rate,
            save_steps=self.save_steps,
            seed=self.seed,
            device=device,
            lora_rank=self.lora_rank if self.lora else None,
            keep_adapter=self.keep_adapter,
            epochs=self.epochs,
            max_steps=self.max_steps,
            report_to=self.report_to,
            **self.memory_options(device),
        )


def _need_package(package: str, given: str, *, extra: str | None = None) -> None:
    """Raises UsageError where an option is given whose package is not installed."""
    if given and find_spec(package) is None:
        install = f"'.[{extra}]'" if extra else "flash-attn"
        raise UsageError(
            f"{given} needs {package}, which is not installed", hint=f"pip install {install}", code="missing-dependency"
        )
