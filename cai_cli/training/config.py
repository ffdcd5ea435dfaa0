"""The settings of a trainer, shared by sft, train-pm, rl and dpo.

The randomness of a step (sampled replies, dropout) derives from (seed, step) alone, and the order of the data from the
seed. So a run that was killed and resumed ends with the same parameters as one that was not.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.models.loading import auto_dtype
from cai_cli.models.text_part import modules_without_adapters
from cai_cli.runtime.config import StageConfig
from cai_cli.training import distributed

# Name of an optimiser -> its name in transformers.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a trainer.

    Attributes:
        batch_size: Rows in one forward pass of one process, as in TRL.
        gradient_accumulation: Forward passes of one process in one step.
        learning_rate: Peak learning rate of AdamW.
        save_steps: Steps between checkpoints.
        seed: Random seed.
        device: "cpu" or "cuda".
        lora_rank: Rank of the adapters; None trains all weights.
        keep_adapter: Whether the adapters are written beside the merged model too.
        epochs: Passes over the data.
        max_steps: Number of steps, which replaces `epochs`; None for no limit.
        schedule: Schedule of the learning rate, by its name in transformers.
        dtype: Precision of forward and backward passes, "auto" or torch's name.
        report_to: Where metrics are logged besides metrics.jsonl, by its name in transformers.
        weights: Precision of the weights in memory, "auto" or torch's name (`trained_dtype`, `frozen_dtype`).
        gradient_checkpointing: Whether activations are computed again in the backward pass: "on", "off", or "auto" (on
            with CUDA).
        quantize: "4bit" to quantise the weights under adapters, else None.
        attention: The implementation of attention, by its name in transformers; None for its default.
        optimizer: The name of the optimiser, one of `OPTIMIZERS`.
        liger: Whether to use Liger's kernels.
    """

    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    save_steps: int
    seed: int
    device: str
    lora_rank: int | None = None
    keep_adapter: bool = False
    epochs: float = 1.0
    max_steps: int | None = None
    schedule: str = "linear"
    dtype: str = "auto"
    report_to: str | None = None
    weights: str = "auto"
    gradient_checkpointing: str = "auto"
    quantize: str | None = None
    attention: str | None = None
    optimizer: str = "adamw"
    liger: bool = False

    @property
    def precision(self) -> str:
        """`dtype`, where "auto" depends on the device."""
        return auto_dtype(self.device) if self.dtype == "auto" else self.dtype

    @property
    def frozen_dtype(self) -> str:
        """The precision of weights that are not trained: those of a reference model, or those under adapters."""
        return auto_dtype(self.device) if self.weights == "auto" else self.weights

    @property
    def trained_dtype(self) -> str:
        """The precision in which the model to train is loaded. The adapters of LoRA are float32 in any case."""
        if self.weights == "auto" and self.lora_rank is None:
            return "float32"
        return self.frozen_dtype

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of `load_causal_lm` and `load_reward_model` for the model to train."""
        return {
            "dtype": self.trained_dtype,
            "device": self.device,
            "attention": self.attention,
            "quantize": self.quantize,
            "sharded": distributed.weights_are_sharded(),
        }

    @property
    def reference_options(self) -> dict[str, str | None] | None:
        """TRL's `model_init_kwargs`, for the reference model; None where it is loaded as the policy is."""
        if distributed.weights_are_sharded():  # by itself TRL would spread it over all GPUs, from every process
            return {"dtype": self.frozen_dtype, "device_map": None}
        return {"dtype": self.frozen_dtype} if self.frozen_dtype != self.trained_dtype else None

    @property
    def checkpoints_activations(self) -> bool:
        """`gradient_checkpointing`, where "auto" is on with CUDA."""
        return self.gradient_checkpointing == "on" or (self.gradient_checkpointing == "auto" and self.device == "cuda")

    @property
    def trains(self) -> bool:
        """Whether there is any step; `--epochs 0` has none."""
        return bool(self.max_steps or self.epochs)

    def autocast(self) -> Any:
        """A context in which forward passes outside the trainer have its precision."""
        import torch

        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def arguments(self, work: Path) -> dict[str, Any]:
        """Keyword arguments for any TRL config.

        Args:
            work: The directory of checkpoints.
        """
        cpu = self.device == "cpu"
        return {
            "output_dir": str(work),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.schedule,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "save_steps": self.save_steps,
            "save_total_limit": 2,  # a kill during a save leaves the previous checkpoint
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "seed": self.seed,
            "use_cpu": cpu,
            "bf16": self.precision == "bfloat16",
            "activation_checkpointing": self.checkpoints_activations,
            "optim": OPTIMIZERS[self.optimizer],
            "use_liger_kernel": self.liger,
            "dataloader_pin_memory": not cpu,
            "ddp_find_unused_parameters": False,  # every pass uses all parameters
            "disable_tqdm": True,
            "report_to": [self.report_to] if self.report_to else [],
            "project": "cai",
            "run_name": work.stem,  # `work` is OUT.partial
        }

    @property
    def effective_batch(self) -> int:
        """Rows in one step of all processes together."""
        return self.batch_size * self.gradient_accumulation * distributed.world_size()

    def steps(self, rows: int) -> int:
        """The number of steps that the trainer takes on this number of rows."""
        batches = -(-rows // (self.batch_size * distributed.world_size()))
        return self.max_steps or math.ceil(self.epochs * -(-batches // self.gradient_accumulation))

    def settings(self, config: StageConfig, **resolved: Any) -> dict[str, Any]:
        """The options that decide the trained model, as a manifest records them.

        Args:
            config: The options of the stage.
            resolved: Values that replace an option's, or are recorded beside the options.

        The number of processes that share an effective batch is not among them, so a run may resume with another one.
        """
        settings = config.settings(
            effective_batch=self.effective_batch, precision=self.precision, weights=self.trained_dtype, **resolved
        )
        settings.pop("dtype", None)  # recorded as the precision it resolved to
        return settings

    def facts(self, order: str, rows: int) -> dict[str, Any]:
        """How rows are divided among processes and batches, for the manifest.

        Args:
            order: The order of the data, in words.
            rows: Number of rows in an epoch.

        Returns:
            The sizes, the seed and the order. `repeated_rows` is the number of rows of an epoch that are used twice,
            because all processes do the same number of whole batches.
        """
        return {
            "processes": distributed.world_size(),
            "batch_size": self.batch_size,
            "gradient_accumulation": self.gradient_accumulation,
            "effective_batch": self.effective_batch,
            "repeated_rows": self.repeated_rows(rows),
            "data_order": order,
            "seed": self.seed,
        }

    def repeated_rows(self, rows: int) -> int:
        """The number of rows of an epoch of `rows` that are used twice."""
        return -rows % (self.batch_size * distributed.world_size()) if distributed.world_size() > 1 else 0

    def peft_config(self, model: Any = None, *, classifier: bool = False) -> Any:
        """The LoRA config, or None where all weights are trained.

        Args:
            model: The model to train, of which some kinds have layers that take no adapters.
            classifier: Whether the model has a scalar head.
        """
        if self.lora_rank is None:
            return None
        from peft import LoraConfig, TaskType

        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            target_modules="all-linear",
            exclude_modules=(modules_without_adapters(model) if model is not None else None) or None,
            task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        )
