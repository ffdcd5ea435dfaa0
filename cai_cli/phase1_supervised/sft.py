"""`cai sft`: fine-tune a language model on its own revisions (paper section 3, the SL-CAI model).

As in the paper, every revision of every round is an example (`--revisions all`), sampled replies to helpful prompts
are mixed in (`--helpful`), and training is one epoch. Departures: the loss is on the reply only; the paper starts from
a pretrained model, we from whatever `--model` names; its learning rate (half that of pretraining) means nothing for
another model, so it is an option; the helpful share is a ratio (the paper has 135k helpful to 183k red-team prompts).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_cli.common import console
from cai_cli.common.errors import RowError
from cai_cli.common.seeds import seed_for
from cai_cli.data.formats import completed_row
from cai_cli.data.schema import Message, Revision, Sample, conversation_id, reject
from cai_cli.data.splits import held_out_keys, mixed, too_long_for
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import tokenizer_and_window
from cai_cli.models.source import ModelSource
from cai_cli.prompting.base import assistant
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import DEFAULT_MODEL, MODEL_TO_TRAIN_HELP
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training.checkpoints import save_finished
from cai_cli.training.config import (
    TrainingConfig,
)
from cai_cli.training.cpu_logprobs import use_plain_head
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.options import EpochOptions
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob, rows_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {
    "epoch": "epoch",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "token_accuracy": "mean_token_accuracy",
}


class Revisions(StrEnum):
    """Which revisions of a row are trained on."""

    ALL = "all"
    LAST = "last"


class SftConfig(EpochOptions):
    """Fine-tune a model on revisions.

    INPUT: Revision rows, or any rows with a prompt and a completion. Writes a model directory.
    """

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    helpful: str | None = option(
        None,
        "JSONL of helpful prompts with completions (`cai sample`) to mix in.",
        Option(Effect.HASHED, reads_file=True),
    )
    helpful_ratio: float = option(1.0, "Helpful examples for each revision example.", ge=0.0)
    revisions: Revisions = option(
        Revisions.ALL, "Train on the revisions of every round, as the paper does, or only on the last."
    )


@dataclass(frozen=True)
class Example:
    """One reply to learn, and the row it came from."""

    row: Sample
    reply: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and reply; the first `prompt_length` of them carry no loss."""

    ids: list[int]
    prompt_length: int

    def columns(self) -> dict[str, list[int]]:
        labels = [-100] * self.prompt_length + self.ids[self.prompt_length :]
        return {"input_ids": self.ids, "labels": labels}


def examples_of(row: Sample, revisions: Literal["all", "last"]) -> list[Example]:
    """What a row teaches: its completion and, with `all`, the revisions of the rounds before."""
    earlier = [turn.response for turn in row.history[1:]] if isinstance(row, Revision) else []
    replies = [*(earlier if revisions == "all" else []), row.completion[0].content]
    return [Example(row, reply) for reply in replies]


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], reply: str) -> Encoded:
    """Prompt and reply in the chat template. Raises RowError when the template refuses them."""
    start = encode_chat(tokenizer, prompt, add_generation_prompt=True)
    ids = encode_chat(tokenizer, [*prompt, assistant(reply)], add_generation_prompt=False)
    if ids[: len(start)] != start:
        raise RowError("the chat template does not render the prompt as the start of the conversation")
    return Encoded(ids, len(start))


def encode_all(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], max_length: int, counts: Counts, *, window: int
) -> list[tuple[Example, Encoded]]:
    """Every example that can be trained on; the others are rejected into `counts`. `window`: how many tokens the model
    takes."""
    fitting, too_long = [], too_long_for(max_length, window)
    for example in examples:
        try:
            encoded = encode(tokenizer, example.row.prompt, example.reply)
        except RowError as error:
            counts.reject(reject(example.row.key, error.message, example.row))
            continue
        if not example.reply.strip():
            counts.reject(reject(example.row.key, "empty completion", example.row))
        elif len(encoded.ids) > min(max_length, window):
            counts.reject(reject(example.row.key, too_long, example.row))
        else:
            fitting.append((example, encoded))
    return fitting


def sft(
    base: Path,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[Encoded],
    held_out: Sequence[Encoded],
    training: TrainingConfig,
    work: Path,
) -> dict[str, Any]:
    """Train the model in `base`; the finished one is left in `work/model`. Returns the figures."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from cai_cli.models.loading import load_causal_lm

    model = load_causal_lm(base, "float32", training.device)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, "held_out_loss"])
    with quiet_libraries():
        ready = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = without_printer(
            _by_row(SFTTrainer)(
                model=model,
                processing_class=tokenizer,
                args=SFTConfig(**training.arguments(work), **ready),
                train_dataset=Dataset.from_list([e.columns() for e in train]),
                eval_dataset=Dataset.from_list([e.columns() for e in held_out]) if held_out else None,
                peft_config=training.peft_config(),
                compute_metrics=lambda rows: {"token_loss": float(rows.predictions.sum() / rows.label_ids.sum())},
            )
        )
        use_plain_head(trainer)

        def held_out_loss() -> float | None:
            return float(trainer.evaluate()["eval_token_loss"]) if held_out else None

        def judge_the_start() -> None:
            if metrics.at(0) is None:
                metrics.put(0, {"held_out_loss": held_out_loss()})

        # Not before `fit`: accelerate takes a model that was evaluated for a prepared one, and each process would train
        # its own.
        trainer.add_callback(_at_the_start(judge_the_start))
        throughput = fit(trainer, metrics, COLUMNS, name="sft")
        steps = int(trainer.state.global_step)
        after = held_out_loss()
        metrics.put(steps, {"held_out_loss": after})
        save_finished(trainer, tokenizer, work / "model")
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {
        "steps": steps,
        "loss_before": losses[0],
        "loss": losses[-1],
        "held_out_loss_before": metrics.rows[0]["held_out_loss"],
        "held_out_loss": after,
        "throughput": throughput,
    }


def _at_the_start(act: Callable[[], None]) -> Any:
    """A trainer callback that acts once the model is ready for training, before the first step."""
    from transformers import TrainerCallback

    class AtTheStart(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            act()

    return AtTheStart()


def _by_row(trainer_class: Any) -> Any:
    """The trainer class, whose evaluation gives each row's loss and number of tokens: their sums do not depend on how
    the rows are dealt out among batches and processes (of the rows that fill the last batch up none is counted)."""
    import torch

    class ByRow(trainer_class):  # type: ignore[misc]
        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                out = model(**inputs, use_cache=False, fused_lm_head=True)
            losses, tokens = -out.log_probs.float().sum(1), out.label_mask.sum(1)
            return losses.mean(), losses, tokens

    return ByRow


@dataclass(frozen=True)
class SftData:
    """The examples of a run, and what identifies the rows they come from."""

    train: Sequence[Encoded]
    held_out: Sequence[Encoded]
    tokenizer: "PreTrainedTokenizerBase"
    counts: Counts
    rows: dict[str, Any]


def read_examples(config: SftConfig, base: Path) -> SftData:
    """Read, mix, encode and split the examples. Raises CaiError."""
    reader, helpful_reader = config.row_reader(), config.row_reader()
    rows = [row for _, row in reader.rows(config.input, completed_row, config.limit)]
    helpful_rows = [row for _, row in helpful_reader.rows(config.helpful, completed_row)] if config.helpful else []
    mine = [example for row in rows for example in examples_of(row, config.revisions.value)]
    theirs = [example for row in helpful_rows for example in examples_of(row, "last")]
    chosen = mixed(mine, theirs, config.helpful_ratio, seed_for(config.seed, "sft", "helpful"))
    counts = Counts.of_training([*reader.take_invalid(), *helpful_reader.take_invalid()])
    if left := len(mine) + len(theirs) - len(chosen):
        counts.skipped["beyond --helpful-ratio"] = left
    if config.helpful and len(theirs) < round(config.helpful_ratio * len(mine)):
        console.say(
            f"sft: {config.helpful} has {len(theirs):,} examples, fewer than --helpful-ratio requests; all are used"
        )
    tokenizer, window = tokenizer_and_window(base)
    fitting = encode_all(tokenizer, chosen, config.max_length, counts, window=window)
    prompts = [conversation_id(example.row.prompt) for example, _ in fitting]
    apart = held_out_keys(prompts, config.eval_share, config.seed)
    train = [encoded for (_, encoded), prompt in zip(fitting, prompts, strict=True) if prompt not in apart]
    held_out = [encoded for (_, encoded), prompt in zip(fitting, prompts, strict=True) if prompt in apart]
    counts.train, counts.held_out = len(train), len(held_out)
    return SftData(train, held_out, tokenizer, counts, rows_digest([*rows, *helpful_rows]))


def estimate(rows: RowFlow, config: SftConfig) -> StepCost:
    """The cost of training on every example, `--epochs` times."""
    examples = rows.rows * (max(1, rows.rounds) if config.revisions is Revisions.ALL else 1)
    tokens = examples * (rows.prompt_tokens + rows.reply_tokens) * config.epochs
    return StepCost(examples, 0, TokenCounts(trained_tokens=tokens), rows)


def run(config: SftConfig) -> dict[str, Any]:
    """Train on a file of rows. Returns the summary. Raises CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model)
    inputs = {"revisions": hash_input(config.input)}
    if config.helpful:
        inputs["helpful"] = hash_input(config.helpful)
    data = read_examples(config, base.path)
    training = config.training_config()
    return TrainingJob(
        provenance=provenance(
            "sft",
            inputs=inputs,
            settings=training.settings(config),
            model={"fingerprint": base.fingerprint},
            rows=data.rows,
        ),
        inputs=inputs,
        models={"model": base},
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=data.counts,
        train=lambda work: sft(base.path, data.tokenizer, data.train, data.held_out, training, work),
        facts=training.facts("all examples in a new random order every epoch", len(data.train)),
    ).run(as_json=config.as_json)


STAGE = Stage("sft", Phase.SUPERVISED, SftConfig, run, estimate, reads=(Revision, Sample), writes=None)
