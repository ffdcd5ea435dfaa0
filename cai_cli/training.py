"""How the three training stages train: one recipe, exact resume, metrics, and no word from the libraries.

The noise of a step (sampled replies, dropout) comes from (seed, step) alone and the order of the data from the seed,
so a run that was killed and resumed ends with the parameters of one that was not.
"""

import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
import typer

from cai_cli import console, ranks
from cai_cli.checkpoints import newest_checkpoint, seal
from cai_cli.engines.base import seed_for
from cai_cli.errors import CaiError, UsageError
from cai_cli.jsonl import cut_torn_tail
from cai_cli.manifest import settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Epochs = Annotated[float, typer.Option(min=0.0, help="Passes over the rows.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps instead of --epochs.")]
TrainBatchSize = Annotated[int, typer.Option(min=1, help="Rows in one forward pass of one process.")]
GradientAccumulation = Annotated[int, typer.Option(min=1, help="Forward passes of each process in one step.")]
LearningRate = Annotated[float, typer.Option(min=0.0, help="Peak learning rate of AdamW.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Longest row in tokens; longer ones are rejected, never cut.")]
Lora = Annotated[
    bool, typer.Option("--lora/--full", help="Train low-rank adapters, merged at the end, or all weights.")
]
LoraRank = Annotated[int, typer.Option(min=1, help="Rank of the adapters, with --lora.")]
SaveSteps = Annotated[int, typer.Option(min=1, help="Steps between checkpoints, from which a killed run goes on.")]


@dataclass(frozen=True)
class Recipe:
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
        return self.batch_size * self.gradient_accumulation * ranks.world_size()

    def settings(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a training command that decide what comes out, for its provenance. How many processes share
        an effective batch decides nothing: a run may go on with another number."""
        decisive = {k: v for k, v in flags.items() if k not in ("dtype", "gradient_accumulation")}
        dealt = {"batch_size": self.batch_size} if "gradient_accumulation" in flags else {}  # of rl it decides nothing
        return settings_of(decisive, **dealt, effective_batch=self.effective_batch, precision=self.precision)

    def facts(self, order: str, rows: int) -> dict[str, Any]:
        """How `rows` were dealt out, for the manifest. `order`: in words, in which order they come. `repeated_rows`:
        how many of an epoch come twice, as all processes do the same number of whole batches."""
        together = self.batch_size * ranks.world_size()
        return {
            "processes": ranks.world_size(),
            "batch_size": self.batch_size,
            "gradient_accumulation": self.gradient_accumulation,
            "effective_batch": self.effective_batch,
            "repeated_rows": -rows % together if ranks.world_size() > 1 else 0,
            "data_order": order,
            "seed": self.seed,
        }

    def peft_config(self, *, classifier: bool = False) -> Any:
        """The LoRA config, or None where all weights are trained. Raises UsageError."""
        if self.lora_rank is None:
            return None
        if ranks.weights_are_sharded():
            raise UsageError("--lora merges its adapters into whole weights", hint="--full, or multi_gpu, zero1, zero2")
        from peft import LoraConfig, TaskType

        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            target_modules="all-linear",
            task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        )


def pick_device(device: str) -> str:
    """`--device` as torch spells it; auto is cuda where there is one. Raises UsageError, CaiError."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {device!r}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CaiError("this machine has no cuda device", hint="`cai doctor` lists this machine's devices")
    return device


def context_window(config: Any, tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens a model with this config takes at most."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))


def tokenizer_and_window(path: Path) -> tuple["PreTrainedTokenizerBase", int]:
    """The tokenizer of the model in `path`, and how many tokens the model takes at most."""
    from transformers import AutoConfig

    from cai_cli.models import load_tokenizer

    tokenizer = load_tokenizer(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)  # nosec B615
    return tokenizer, context_window(config, tokenizer)


def too_long_for(max_length: int, window: int) -> str:
    """Why a row of more tokens than either is rejected."""
    return "longer than --max-length" if max_length <= window else f"longer than the model's window of {window:,}"


def mixed(own: Sequence[T], others: Sequence[T], ratio: float, seed: int) -> list[T]:
    """`own` and, per one of them, `ratio` of the others drawn without replacement (all where there are fewer)."""
    wanted = round(ratio * len(own))
    if len(others) <= wanted:
        return [*own, *others]
    kept = sorted(random.Random(seed).sample(range(len(others)), wanted))  # noqa: S311
    return [*own, *(others[i] for i in kept)]


def held_out_keys(keys: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Which of the distinct `keys` are held out: `share` of them, at least one where there are twenty or more.

    The choice is by the hash of (seed, key): rows with one key stay together.
    """
    distinct = set(keys)
    count = int(share * len(distinct))
    if share > 0 and len(distinct) >= 20:
        count = max(1, count)
    return apart(distinct, count, seed)


def apart(keys: Iterable[str], count: int, seed: int) -> frozenset[str]:
    """`count` of `keys`, chosen by the hash of (seed, key)."""
    return frozenset(sorted(keys, key=lambda key: (seed_for(seed, "held-out", key), key))[:count])


# --- one trainer, from its newest checkpoint to its last step ------------------------------------------------------


def fit(trainer: Any, metrics: "Metrics", columns: Mapping[str, str], *, name: str) -> dict[str, float | None]:
    """Train to the end, going on from the newest complete checkpoint in the trainer's output directory.

    `columns`: name in metrics.jsonl -> name in the trainer's log. Returns how many tokens this run went through, of all
    processes, and how many a second. Raises CaiError when the checkpoint was changed since it was saved or holds more
    than numbers, the loss is no number or the disk is full.
    """
    checkpoint = ranks.from_leader(lambda: newest_checkpoint(Path(trainer.args.output_dir)))
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics.cut_after(done)
    if checkpoint:
        console.say(f"{name}: going on after step {done:,}")
    try:
        with ExitStack() as stack:
            steps = _steps_callback(metrics, columns, name, stack)
            trainer.add_callback(steps)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except UnpicklingError as error:  # torch's, of whatever is more than numbers
        raise CaiError(
            f"{checkpoint} cannot be loaded: it holds pickled objects, which could run code",
            hint="--overwrite starts afresh",
        ) from error
    except OSError as error:
        raise CaiError(
            f"cannot write {trainer.args.output_dir}: {error.strerror or error}",
            hint="the checkpoints before are kept; run again to go on",
        ) from error
    rate = steps.tokens / steps.seconds if steps.tokens and steps.seconds else None
    return {"tokens": int(steps.tokens), "seconds": steps.seconds, "tokens_per_second": rate and round(rate, 1)}


def without_printer(trainer: Any) -> Any:
    """The trainer, its habit of printing every log row to stdout taken away."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _steps_callback(metrics: "Metrics", columns: Mapping[str, str], name: str, stack: ExitStack) -> Any:
    from accelerate import PartialState
    from transformers import TrainerCallback, set_seed

    class Steps(TrainerCallback):  # type: ignore[misc]
        advance: Callable[[float], None]
        watch: console.Stopwatch
        tokens = seconds = 0.0
        before = 0.0  # tokens that a run before this one went through

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.watch, self.before = console.Stopwatch(), state.num_input_tokens_seen
            self.advance = stack.enter_context(console.track(state.max_steps, name, "steps"))
            self.advance(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # A checkpoint restores torch's generators but not those of every library, nor across worker counts.
            set_seed((seed_for(args.seed, "step", state.global_step) + args.process_index) % 2**32)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = round(self.watch.seconds, 2)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.advance(1)
            if state.global_step >= state.max_steps:
                control.should_save = False  # the finished model is saved next; a checkpoint would be a third copy

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            PartialState().wait_for_everyone()  # every process has a file of its own in the checkpoint
            if state.is_world_process_zero:
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise CaiError(
                    f"the loss is {logs['loss']} at step {state.global_step}", hint="a lower --learning-rate may help"
                )
            metrics.put(state.global_step, {ours: logs.get(theirs) for ours, theirs in columns.items()})
            # Of SFT and RewardTrainer counted from 0 in every run, of RLOO and GRPO from the checkpoint's count on.
            self.tokens = max(self.tokens, logs.get("num_tokens", 0.0) - self.before)

    return Steps()


def finished_model(trainer: Any) -> Any:
    """The trained model with its adapters, if any, merged into its weights."""
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if is_peft_model(model) else model


def save_finished(trainer: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write the trained model, its weights gathered from all processes where they are sharded. Called on every rank."""
    if ranks.weights_are_sharded():
        with quiet_libraries():
            trainer.save_model(str(directory))
        if ranks.leads():
            (directory / "training_args.bin").unlink(missing_ok=True)
            tokenizer.model_max_length = context_window(trainer.model.config, tokenizer)
            tokenizer.save_pretrained(directory)
    elif ranks.leads():
        save_model(finished_model(trainer), tokenizer, directory)


def save_model(model: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write what `from_pretrained` reads: safetensors, config, tokenizer."""
    tokenizer.model_max_length = context_window(model.config, tokenizer)  # unknown is written as 1e30
    with quiet_libraries():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


class Metrics:
    """`metrics.jsonl`: one object per step, all with the same keys; what a row lacks is null. Every rank holds the
    rows, rank 0 writes them."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, tuple(names)
        self.rows: list[dict[str, Any]] = ranks.from_leader(self._read)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        cut_torn_tail(self.path)
        return [orjson.loads(line) for line in self.path.read_bytes().splitlines()]

    def at(self, step: int) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["step"] == step), None)

    def put(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """A row for `step`, or more values for it where it is the last one."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1] |= {k: v for k, v in values.items() if v is not None}
            self._write_all()
            return
        row = {"step": step, **dict.fromkeys(self.names), **values}
        self.rows.append(row)
        if ranks.leads():
            with self.path.open("ab") as file:
                file.write(orjson.dumps(row) + b"\n")

    def cut_after(self, step: int) -> None:
        """Forget the steps after the checkpoint that a run goes on from: they are done again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._write_all()

    def _write_all(self) -> None:
        if not ranks.leads():
            return
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in self.rows))
        os.replace(temporary, self.path)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it the training libraries print no bar, no log line and no warning, and send no telemetry."""
    import logging

    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    constants.HF_HUB_DISABLE_TELEMETRY = True  # read from the environment at import, which may be behind us
    verbosity = transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
