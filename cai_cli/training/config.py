"""How the three training stages train: one recipe, exact resume, metrics, and no word from the libraries.

The noise of a step (sampled replies, dropout) comes from (seed, step) alone and the order of the data from the seed,
so a run that was killed and resumed ends with the parameters of one that was not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.runtime.config import StageConfig
from cai_cli.training import distributed


@dataclass(frozen=True)
class TrainingConfig:
    """What every trainer is told. `device` is "cpu" or "cuda"; `lora_rank` None trains all weights. Batch size and
    accumulation are those of one process, as in TRL.

    `dtype` is that of the forward and backward pass ("auto" or as torch spells it); the weights are float32.
    """

    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    save_steps: int
    seed: int
    device: str
    lora_rank: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    schedule: str = "linear"
    dtype: str = "auto"
    report_to: str | None = None

    @property
    def precision(self) -> str:
        """`dtype`; of auto float32 on CPU, bfloat16 on cuda."""
        return {"cpu": "float32", "cuda": "bfloat16"}[self.device] if self.dtype == "auto" else self.dtype

    @property
    def trains(self) -> bool:
        """Whether there is any step to do: `--epochs 0` has none."""
        return bool(self.max_steps or self.epochs)

    def autocast(self) -> Any:
        """The context in which a pass outside the trainer has the precision of those inside."""
        import torch

        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def arguments(self, work: Path) -> dict[str, Any]:
        """Keyword arguments for any TRL config."""
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
            "save_total_limit": 2,  # a kill while the newest is being written leaves the one before
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "seed": self.seed,
            "use_cpu": cpu,
            "bf16": self.precision == "bfloat16",
            "gradient_checkpointing": False,
            "dataloader_pin_memory": not cpu,
            "ddp_find_unused_parameters": False,  # all take part in every pass
            "disable_tqdm": True,
            "report_to": [self.report_to] if self.report_to else [],
            "project": "cai",
            "run_name": work.stem,  # of OUT.partial
        }

    @property
    def effective_batch(self) -> int:
        """Rows in one step, of all processes."""
        return self.batch_size * self.gradient_accumulation * distributed.world_size()

    def settings(self, config: StageConfig) -> dict[str, Any]:
        """The options that decide the trained model, as a manifest records them. How many processes share an effective
        batch does not decide it: a run may resume with another number."""
        settings = config.settings(effective_batch=self.effective_batch, precision=self.precision)
        settings.pop("dtype", None)  # recorded as the precision it resolved to
        return settings

    def facts(self, order: str, rows: int) -> dict[str, Any]:
        """How `rows` were dealt out, for the manifest. `order`: in words, in which order they come. `repeated_rows`:
        how many of an epoch come twice, as all processes do the same number of whole batches."""
        together = self.batch_size * distributed.world_size()
        return {
            "processes": distributed.world_size(),
            "batch_size": self.batch_size,
            "gradient_accumulation": self.gradient_accumulation,
            "effective_batch": self.effective_batch,
            "repeated_rows": -rows % together if distributed.world_size() > 1 else 0,
            "data_order": order,
            "seed": self.seed,
        }

    def peft_config(self, *, classifier: bool = False) -> Any:
        """The LoRA config, or None where all weights are trained. Raises UsageError."""
        if self.lora_rank is None:
            return None
        if distributed.weights_are_sharded():
            raise UsageError("--lora merges its adapters into whole weights", hint="--full, or multi_gpu, zero1, zero2")
        from peft import LoraConfig, TaskType

        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            target_modules="all-linear",
            task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        )
