"""`cai sft`: fine-tune a language model on revisions (paper section 3, the SL-CAI model).

As in the paper, every revision of every round is an example (`--revisions all`), sampled replies to helpful prompts are
mixed in (`--helpful`), and training is one epoch. Revisions and replies of several files train one model (`--also`,
`--also-helpful`), as those of a small model and of a larger one. Departures: the loss covers the reply only, and of a
reply that was cut off at the length limit not its end of turn (`--cut-off`), which the model did not write; the paper
starts from a pretrained model, this stage from `--model`; the paper's learning rate, half that of pretraining, does not
carry over to other models, so it is an option; `--drop-system` trains on the replies of a teacher with a system prompt
as if it had none (context distillation, Askell et al. 2021, arXiv 2112.00861); the learning rate falls linearly to
zero, where the paper's is constant, because runs here have few steps, of fewer rows than the paper's 1,024; the helpful
share is a ratio (the paper has 2 replies to each of 135k helpful prompts for 4 revisions of each of 183k red-team
prompts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_cli.common import console
from cai_cli.common.errors import RowError
from cai_cli.common.seeds import seed_for
from cai_cli.data.formats import completed_row
from cai_cli.data.reply_ends import CUT_OFF, cut_off_share
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Revision, Sample, conversation_id, reject
from cai_cli.data.splits import held_out_keys, mixed, too_long_for
from cai_cli.models.loading import tokenizer_and_window
from cai_cli.models.source import ModelSource
from cai_cli.phase1_supervised.packing import check_packing, pack, with_padded_evaluation
from cai_cli.prompting.system import without_system
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import DEFAULT_MODEL, MODEL_TO_TRAIN_HELP
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import sharding
from cai_cli.training.batch_order import sampler_class
from cai_cli.training.checkpoints import save_finished
from cai_cli.training.completions import Encoded, encode
from cai_cli.training.config import TrainingConfig
from cai_cli.training.cpu_logprobs import use_unfused_head
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.memory_check import check_memory
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
    """Which revisions of a row are training examples."""

    ALL = "all"
    LAST = "last"


class CutOff(StrEnum):
    """What becomes of a reply that was cut off at the length limit."""

    OPEN = "open"
    SKIP = "skip"
    WHOLE = "whole"


class SftConfig(EpochOptions):
    """Fine-tune a model on revisions.

    INPUT: Revision rows, or conversations in any format that `cai convert` reads; the last turn of the assistant is
    trained on. Writes a model directory.
    """

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    helpful: str | None = option(
        None,
        "JSONL of replies to helpful prompts, from `cai sample`, to mix in.",
        Option(Effect.HASHED, reads_file=True),
    )
    also: list[str] | None = option(
        None,
        "JSONL of more revisions, such as those of a larger model, which count as part of INPUT; repeatable.",
        Option(Effect.HASHED, metavar="FILE", reads_file=True),
    )
    also_helpful: list[str] | None = option(
        None,
        "JSONL of more replies to helpful prompts, which count as part of --helpful; repeatable.",
        Option(Effect.HASHED, metavar="FILE", reads_file=True),
    )
    helpful_ratio: float = option(1.0, "Helpful examples for each revision example.", ge=0.0)
    revisions: Revisions = option(
        Revisions.ALL, "Train on the revisions of every round, as the paper does, or only on the last."
    )
    cut_off: CutOff = option(
        CutOff.OPEN,
        "Replies that were cut off at the length limit: train on them without an end of turn (open), leave them out "
        "(skip), or train on them as if they were whole (whole).",
    )
    drop_system: bool = option(
        False,
        "Train without the system prompts that the replies were sampled with (context distillation).",
        Option(flags=("--drop-system",)),
    )
    packing: bool = option(
        False,
        "Fill each row of a batch with as many examples as --max-length takes, and pad nothing. Examples do not attend "
        "to each other; a model whose layers cannot keep them apart is refused.",
        Option(group=Group.TRAINING, flags=("--packing",)),
    )

    def revision_files(self) -> dict[str, str]:
        """The files of revisions by role, which names them in manifests."""
        return {"revisions": self.input} | {f"also {n}": file for n, file in enumerate(self.also or (), 1)}

    def helpful_files(self) -> dict[str, str]:
        """The files of replies to helpful prompts by role."""
        more = {f"also helpful {n}": file for n, file in enumerate(self.also_helpful or (), 1)}
        return ({"helpful": self.helpful} if self.helpful else {}) | more


@dataclass(frozen=True)
class Example:
    """One reply to train on, the row that contains it, how it ended (null if unknown), and the role of its file."""

    row: Sample
    reply: str
    finish_reason: str | None
    role: str = "revisions"


def examples_of(row: Sample, revisions: Literal["all", "last"], role: str = "revisions") -> list[Example]:
    """The training examples of a row: its completion and, with `all`, the revisions of earlier rounds."""
    earlier = row.history[1:] if isinstance(row, Revision) and revisions == "all" else []
    examples = [Example(row, each.response, each.finish_reason, role) for each in earlier]
    return [*examples, Example(row, row.reply, row.finish_reason, role)]


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    max_length: int,
    counts: Counts,
    *,
    window: int,
    cut_off: CutOff,
) -> list[tuple[Example, Encoded]]:
    """Encode the examples, and reject those that cannot be trained on.

    Args:
        tokenizer: The model's tokenizer.
        examples: Prompts with replies.
        max_length: Longest example in tokens.
        counts: Receives the rejected and skipped rows, and how the other replies ended.
        window: The model's context window in tokens.
        cut_off: What becomes of a reply that was cut off.

    Returns:
        The examples that fit, each with its token ids, in order.
    """
    fitting, too_long = [], too_long_for(max_length, window)
    for example in examples:
        was_cut = example.finish_reason == CUT_OFF
        try:
            encoded = encode(tokenizer, example.row.prompt, example.reply, close=not was_cut or cut_off is CutOff.WHOLE)
        except RowError as error:
            counts.reject(reject(example.row.key, error.message, example.row))
            continue
        if not example.reply.strip():
            counts.reject(reject(example.row.key, "empty completion", example.row))
        elif len(encoded.ids) > min(max_length, window):
            counts.reject(reject(example.row.key, too_long, example.row))
        else:
            counts.reply_ends.add("replies", example.finish_reason)
            if was_cut and cut_off is CutOff.SKIP:
                counts.skipped["cut off at the length limit"] += 1
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
    *,
    packed_length: int | None = None,
) -> dict[str, Any]:
    """Fine-tune a causal language model on replies (paper section 3, the SL-CAI model).

    Args:
        base: Directory of the model that training starts from.
        tokenizer: Its tokenizer.
        train: The examples to train on.
        held_out: The examples to evaluate on; may be empty.
        training: The options of the trainer.
        work: A directory; the trained model is written to `work/model`, the metrics to `work/metrics.jsonl`.
        packed_length: The most tokens in a row of packed examples; None to train on one example a row, with padding.

    Returns:
        The metrics for the manifest. Losses are means per token in nats; `_before` marks those of the start model.

    Raises:
        UsageError: The model cannot be trained on packed examples.
        CaiError: Training fails; see `fit`.
    """
    from cai_cli.models.loading import load_causal_lm

    with sharding.announced(training.arguments(work)):
        model = load_causal_lm(base, **training.loading)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, "held_out_loss"])
    with quiet_libraries():
        trainer = _trainer(model, tokenizer, train, held_out, training, work, packed_length=packed_length)
        trainer.add_callback(_start_evaluation(trainer, metrics))
        throughput = fit(trainer, metrics, COLUMNS, name="sft")
        if packed_length:
            packed = len(trainer.train_dataset)
            throughput |= {"packed_rows": packed, "repeated_rows": training.repeated_rows(packed)}
        steps = int(trainer.state.global_step)
        after = _held_out_loss(trainer)
        metrics.put(steps, {"held_out_loss": after})
        save_finished(trainer, tokenizer, work / "model", keep_adapter=training.keep_adapter)
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {
        "steps": steps,
        "loss_before": losses[0],
        "loss": losses[-1],
        "held_out_loss_before": metrics.rows[0]["held_out_loss"],
        "held_out_loss": after,
        "throughput": throughput,
    }


def _trainer(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[Encoded],
    held_out: Sequence[Encoded],
    training: TrainingConfig,
    work: Path,
    *,
    packed_length: int | None,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    already_encoded = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    rows, trainer_class = [e.columns() for e in train], _with_row_sums(SFTTrainer)
    if packed_length:
        check_packing(model, rows, training)
        trainer_class = with_padded_evaluation(trainer_class)
    else:
        trainer_class = _with_similar_lengths(trainer_class)
    by_length = sorted(held_out, key=lambda example: len(example.ids))
    trainer = without_printer(
        trainer_class(
            model=model,
            processing_class=tokenizer,
            args=SFTConfig(**training.arguments(work), packing=packed_length is not None, **already_encoded),
            train_dataset=pack(rows, packed_length) if packed_length else Dataset.from_list(rows),
            eval_dataset=Dataset.from_list([e.columns() for e in by_length]) if held_out else None,
            peft_config=training.peft_config(model),
            compute_metrics=lambda rows: {"token_loss": float(rows.predictions.sum() / rows.label_ids.sum())},
        )
    )
    use_unfused_head(trainer)
    return trainer


def _held_out_loss(trainer: Any) -> float | None:
    """The mean loss per token over the held-out examples, or None where there are none."""
    return float(trainer.evaluate()["eval_token_loss"]) if trainer.eval_dataset is not None else None


def _start_evaluation(trainer: Any, metrics: Metrics) -> Any:
    """A trainer callback that evaluates the start model before the first step.

    Evaluating before `trainer.train` does not work: accelerate would treat the model as prepared already, and each
    process would train its own copy.
    """
    from transformers import TrainerCallback

    class StartEvaluation(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if metrics.at(0) is None:
                metrics.put(0, {"held_out_loss": _held_out_loss(trainer)})

    return StartEvaluation()


def _with_similar_lengths(trainer_class: Any) -> Any:
    """A subclass of the trainer that trains on batches of similar length."""
    by_length = sampler_class()

    class WithSimilarLengths(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
            return by_length(lengths, self.args.train_batch_size, self.args.seed, "sft")

    return WithSimilarLengths


def _with_row_sums(trainer_class: Any) -> Any:
    """A subclass of the trainer whose evaluation returns the summed loss and the number of tokens of each row.

    Their sums do not depend on how rows are divided among batches and processes. Rows that only fill up the last batch
    are not counted.
    """
    import torch

    class WithRowSums(trainer_class):  # type: ignore[misc]
        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                out = model(**inputs, use_cache=False, fused_lm_head=True)
            losses, tokens = -out.log_probs.float().sum(1), out.label_mask.sum(1)
            return losses.mean(), losses, tokens

    return WithRowSums


@dataclass(frozen=True)
class SftData:
    """The data of a run.

    Attributes:
        train: The examples to train on.
        held_out: The examples to evaluate on.
        tokenizer: The model's tokenizer.
        counts: What happened to the input rows.
        rows: A digest of the rows that were read, for the manifest.
    """

    train: Sequence[Encoded]
    held_out: Sequence[Encoded]
    tokenizer: "PreTrainedTokenizerBase"
    counts: Counts
    rows: dict[str, Any]

    def longest(self, config: SftConfig) -> int:
        """Tokens of the longest row of a batch."""
        return config.max_length if config.packing else max(len(one.ids) for one in (*self.train, *self.held_out))


def read_examples(config: SftConfig, base: Path) -> SftData:
    """Read, mix, encode and split the examples.

    Args:
        config: The options of the stage.
        base: Directory of the model.

    Raises:
        CaiError: A file cannot be read, or a line is invalid.
    """
    readers: list[RowReader] = []
    rows: list[Sample] = []

    def read(role: str, file: str, revisions: Literal["all", "last"]) -> list[Example]:
        of_input = role == "revisions"
        reader = config.row_reader(of_input=of_input)
        readers.append(reader)
        limit = config.limit if of_input else None
        found = [row for _, row in reader.rows(file, lambda value: completed_row(value, dropped=reader.dropped), limit)]
        rows.extend(found)
        used = _without_systems(found, reader) if config.drop_system and role in revision_files else found
        return [example for row in used for example in examples_of(row, revisions, role)]

    revision_files, helpful_files = config.revision_files(), config.helpful_files()
    revisions = [one for role, file in revision_files.items() for one in read(role, file, config.revisions.value)]
    helpful = [one for role, file in helpful_files.items() for one in read(role, file, "last")]
    chosen = mixed(revisions, helpful, config.helpful_ratio, seed_for(config.seed, "sft", "helpful"))
    counts = Counts.of_training(
        [row for reader in readers for row in reader.take_invalid()], reduce(add, (one.dropped for one in readers))
    )
    if unused := len(revisions) + len(helpful) - len(chosen):
        counts.skipped["beyond --helpful-ratio"] = unused
    if helpful_files and len(helpful) < round(config.helpful_ratio * len(revisions)):
        files = " and ".join(helpful_files.values())
        have = "have" if len(helpful_files) > 1 else "has"
        console.say(f"sft: {files} {have} {len(helpful):,} examples, fewer than --helpful-ratio requests; all are used")
    tokenizer, window = tokenizer_and_window(base)
    fitting = encode_all(tokenizer, chosen, config.max_length, counts, window=window, cut_off=config.cut_off)
    _report_cut_off(counts, config.cut_off)
    prompts = [conversation_id(example.row.prompt) for example, _ in fitting]
    held_out_prompts = held_out_keys(prompts, config.eval_share, config.seed)
    train = [encoded for (_, encoded), prompt in zip(fitting, prompts, strict=True) if prompt not in held_out_prompts]
    held_out = [encoded for (_, encoded), prompt in zip(fitting, prompts, strict=True) if prompt in held_out_prompts]
    counts.train, counts.held_out = len(train), len(held_out)
    counts.by_input.update(example.role for example, _ in fitting)
    return SftData(train, held_out, tokenizer, counts, rows_digest(rows))


def _without_systems(rows: Sequence[Sample], reader: RowReader) -> list[Sample]:
    """The rows without their system prompts, which the reader counts as left out."""
    used = [row.model_copy(update={"prompt": without_system(row.prompt)}) for row in rows]
    dropped = sum(one.prompt != row.prompt for one, row in zip(used, rows, strict=True))
    reader.dropped.counts["system prompt"] += dropped
    console.say(f"sft: {dropped:,} of {len(rows):,} rows are trained on without their system prompt")
    return used


def _report_cut_off(counts: Counts, cut_off: CutOff) -> None:
    """Say how many replies were cut off, and what becomes of them."""
    treated = {
        CutOff.OPEN: "they are trained on without an end of turn",
        CutOff.SKIP: "they are left out",
        CutOff.WHOLE: "they are trained on as if they were whole",
    }
    if share := cut_off_share(counts.reply_ends.as_json()):
        console.say(f"sft: {share}; {treated[cut_off]} (--cut-off {cut_off})")


def estimate(rows: RowFlow, config: SftConfig) -> StepCost:
    """The cost of training on every example, `--epochs` times or for `--max-steps`."""
    examples = rows.rows * (max(1, rows.rounds) if config.revisions is Revisions.ALL else 1)
    tokens = config.trained_rows(examples) * (rows.prompt_tokens + rows.reply_tokens)
    return StepCost(examples, 0, TokenCounts(trained_tokens=tokens), rows)


def run(config: SftConfig) -> dict[str, Any]:
    """Fine-tune on a file of rows. Returns the summary. Raises UsageError, CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model, config.chat_template)
    files = config.revision_files() | config.helpful_files()
    inputs = {role: hash_input(file) for role, file in files.items()}
    data = read_examples(config, base.path)
    training = config.training_config()
    batches = "packed rows" if config.packing else "batches of similar length"
    return TrainingJob(
        provenance=provenance(
            "sft",
            inputs=inputs,
            settings=training.settings(config),
            model=base.identity(),
            rows=data.rows,
        ),
        inputs=inputs,
        models={"model": base},
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=data.counts,
        train=lambda work: sft(
            base.path,
            data.tokenizer,
            data.train,
            data.held_out,
            training,
            work,
            packed_length=config.max_length if config.packing else None,
        ),
        facts=training.facts(f"all examples in a new random order every epoch, in {batches}", len(data.train)),
        check=lambda: check_memory("sft", base.path, training, config.workload(data.longest(config))),
    ).run(as_json=config.as_json)


STAGE = Stage("sft", Phase.SUPERVISED, SftConfig, run, estimate, reads=(Revision, Sample), writes=None)
