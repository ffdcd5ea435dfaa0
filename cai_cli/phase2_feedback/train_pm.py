"""`cai train-pm`: train a preference model on comparisons (paper sections 4.1 and 4.2).

As in the paper, labels are soft: the loss is the cross-entropy between p_chosen and sigmoid(r_chosen - r_rejected).
TRL's RewardTrainer supports hard labels only; adding `(1 - p_chosen) * (r_chosen - r_rejected)` to its loss gives
exactly the soft one. As in the paper, harmlessness comparisons by an AI are mixed with helpfulness comparisons by
humans (`--mix`; the paper has 183k of the former and 135k of the latter). Departures: the paper starts from a model
pretrained on preferences, this stage from `--model` with a scalar head that is random (seeded) or fitted to the labels
first (`--fit-head`); the learning rate falls linearly to zero, as in `sft`.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.schema import JudgedPair, Preference, conversation_id, dump_row
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.models.reading import ReadAt, Reading, record_place, reply_header
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.linear_probe import fit_head, save_head
from cai_cli.phase2_feedback.pm_pairs import EncodedPair, encode_pair, score_held_out
from cai_cli.phase2_feedback.pm_trainer import soft_reward_trainer
from cai_cli.phase2_feedback.preference_data import PairOptions, read_pairs
from cai_cli.phase2_feedback.sharded_evaluation import ShardedEvaluation
from cai_cli.reward.packed_pairs import accept_packed_pairs, enable_packed_pairs
from cai_cli.runtime.config import Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import provenance
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed, sharding
from cai_cli.training.checkpoints import ADAPTER, save_finished, save_given_template, save_model
from cai_cli.training.config import TrainingConfig
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.memory import Workload
from cai_cli.training.memory_check import check_memory
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = {
    "epoch": "epoch",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_score": "mean_reward",
}
HELD_OUT = ("held_out_loss", "held_out_accuracy")


class Place(StrEnum):
    """The tokens of a conversation at which the score is read."""

    END_OF_TURN = ReadAt.END_OF_TURN.value
    MEAN_OVER_REPLY = ReadAt.MEAN_OVER_REPLY.value


class TrainPmConfig(PairOptions):
    """Train a preference model on comparisons.

    INPUT: Preference rows, from `cai label-prefs`, or labelled pairs in any format that `cai convert` reads. Writes
    a model directory, with the scores of the held-out pairs in `held_out.jsonl`.
    """

    keep_adapter: bool = redefine(
        PairOptions,
        "keep_adapter",
        False,
        "With --lora: write the adapter to OUT/adapter too, beside the merged weights. With --fit-head --epochs 0: "
        "write the head alone there, a few kilobytes.",
    )
    fit_head: bool = option(
        False,
        "Fit the head to the labels on the frozen model before training, or start from a random head; with --epochs 0 "
        "only the head is fitted.",
        Option(flags=("--fit-head/--random-head",)),
    )
    read_at: Place = option(
        Place.END_OF_TURN,
        "Where the score is read: at the token that ends the turn, or as the mean over the reply's tokens, which "
        "depends less on how a reply ends.",
    )
    layer: int | None = option(
        None,
        "With --fit-head --epochs 0: the layer whose output the head reads, from 1; the layers above it do not run.",
        ge=1,
    )

    def workload(self, length: int) -> Workload:
        return Workload(length, sequences=2)

    @property
    def has_adapter(self) -> bool:
        return self.lora or (self.fit_head and not (self.epochs or self.max_steps))

    @property
    def adapter_needs(self) -> str:
        return "--lora, or --fit-head with --epochs 0"

    def reading(self, base: Path) -> Reading:
        """Where the score is read. Raises CaiError where the chat template does not show where a reply begins."""
        means = self.read_at is Place.MEAN_OVER_REPLY
        return Reading(ReadAt(self.read_at), None, reply_header(load_tokenizer(base)) if means else (), self.layer)

    def check(self) -> None:
        super().check()
        if self.layer and (self.epochs or self.max_steps or not self.fit_head):
            raise UsageError(
                "--layer is for a head on the frozen model", hint="--fit-head --epochs 0", code="option-conflict"
            )
        if not (self.epochs or self.max_steps or self.fit_head):
            raise UsageError(
                "--epochs 0 trains nothing", hint="--fit-head trains the head alone", code="option-conflict"
            )
        if self.fit_head and distributed.weights_are_sharded():
            raise UsageError(
                "--fit-head needs unsharded weights",
                hint="--fit-head --epochs 0 in one process, whose output is then --model",
                code="sharded-weights",
            )


def train_pm(
    base: Path,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    training: TrainingConfig,
    work: Path,
    *,
    fitted_head: bool,
    reading: Reading,
) -> dict[str, Any]:
    """Train a preference model on soft labels (paper sections 4.1 and 4.2).

    Args:
        base: Directory of the model that training starts from; `tokenizer` is its tokenizer.
        train: The pairs to train on; `held_out` are the pairs to evaluate on and may be empty.
        training: The options of the trainer.
        work: A directory; the model and `held_out.jsonl`, the scores of the held-out pairs, go to `work/model`.
        fitted_head: Whether to start from a head fitted to the labels instead of a random one.
        reading: Where the score is read.

    Returns:
        The metrics for the manifest (losses in nats) on rank 0; an empty dict on other ranks.

    Raises:
        CaiError: The head cannot be fitted, or training fails; see `fit`.
    """
    longest = max([*train, *held_out], key=lambda pair: max(len(pair.chosen), len(pair.rejected)))
    with sharding.announced(training.arguments(work)):
        model = load_reward_model(base, **training.loading, new_head_seed=training.seed, reading=reading)
    sharded = distributed.weights_are_sharded()
    share = (accept_packed_pairs if sharded else enable_packed_pairs)(model, longest.ids)
    evaluation = ShardedEvaluation(tokenizer, held_out, training, work, longest if share else None) if sharded else None
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *HELD_OUT])
    # A resumed run fits the head and evaluates the start model again, because it loads the untrained model too.
    head = start_head(model, train, training, share_prompts=share) if fitted_head else {}
    before, steps, throughput = held_out_metrics([]), 0, dict[str, Any]()
    if evaluation:
        steps, throughput = fine_tune(model, tokenizer, train, training, work, metrics, evaluation, share_prompts=share)
        before = evaluation.before
    elif training.trains:
        before = distributed.from_rank_zero(
            lambda: _start_metrics(model, tokenizer, held_out, training, share_prompts=share)
        )
        if metrics.at(0) is None:
            metrics.put(0, _metrics_row(before))
        steps, throughput = fine_tune(model, tokenizer, train, training, work, metrics, share_prompts=share)
    elif distributed.is_rank_zero():
        save_model(model, tokenizer, work / "model")
        if training.keep_adapter:
            save_head(model, base, work / "model" / ADAPTER)
            save_given_template(model, tokenizer, work / "model" / ADAPTER)
    if not distributed.is_rank_zero():
        return {}
    record_place(work / "model", reading=reading)
    if training.trains and (work / "model" / ADAPTER).is_dir():
        record_place(work / "model" / ADAPTER, reading=reading)
    if evaluation:
        scored = evaluation.after
    else:
        scored = _finished_scores(work / "model", tokenizer, held_out, training, longest if share else None)
    (work / "model/held_out.jsonl").write_bytes(b"".join(dump_row(pair) + b"\n" for pair in scored))
    after = held_out_metrics(scored)
    metrics.put(steps, _metrics_row(after))
    by_source = Counter(pair.row.source or "no source" for pair in train)
    run = {"steps": steps, **head, **_losses(metrics), "pairs_by_source": dict(by_source), "throughput": throughput}
    return run | {"held_out_loss_before": before["held_out_loss"], "accuracy_before": before["accuracy"]} | after


def _losses(metrics: Metrics) -> dict[str, float | None]:
    """The training loss of the first step and of the last."""
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {"loss_before": losses[0] if losses else None, "loss": losses[-1] if losses else None}


def _start_metrics(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    held_out: Sequence[EncodedPair],
    training: TrainingConfig,
    *,
    share_prompts: bool,
) -> dict[str, Any]:
    """The held-out metrics of the model that training starts from."""
    with training.autocast():
        return held_out_metrics(
            score_held_out(model, tokenizer, held_out, training.batch_size, share_prompts=share_prompts)
        )


def _finished_scores(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase",
    held_out: Sequence[EncodedPair],
    training: TrainingConfig,
    longest: EncodedPair | None,
) -> list[JudgedPair]:
    """The held-out pairs with the scores of the trained model.

    The model is loaded again in float32, as users will load it, because training may have run in bfloat16. `longest` is
    the longest pair where pairs are packed.
    """
    from cai_cli.models.loading import load_reward_model

    model = load_reward_model(directory, "float32", training.device)
    share = longest is not None and enable_packed_pairs(model, longest.ids)
    return score_held_out(model, tokenizer, held_out, training.batch_size, share_prompts=share)


def start_head(
    model: "PreTrainedModel", train: Sequence[EncodedPair], training: TrainingConfig, *, share_prompts: bool
) -> dict[str, Any]:
    """Fit the model's head to the pairs, on rank 0, and set it on every rank.

    Args:
        model: The preference model; its head is replaced.
        train: The pairs to fit to.
        training: The options of the trainer.
        share_prompts: Whether the model takes packed pairs, without which no head can be fitted.

    Returns:
        The metrics of the cross-validation.

    Raises:
        CaiError: The model does not take packed pairs, or there are too few prompts.
    """
    if not share_prompts:
        raise CaiError(
            "--fit-head needs a decoder whose layers all use full attention",
            hint="--random-head",
            code="wrong-model-kind",
        )

    def fit_on_rank_zero() -> tuple[dict[str, Any], Any]:
        with training.autocast():
            metrics = fit_head(
                model,
                [pair.ids for pair in train],
                [pair.target for pair in train],
                [conversation_id(pair.row.prompt) for pair in train],
                training.batch_size,
            )
        return metrics, model.score.weight.data.cpu()

    metrics, weight = distributed.from_rank_zero(fit_on_rank_zero)
    model.score.weight.data.copy_(weight)
    return metrics


def fine_tune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[EncodedPair],
    training: TrainingConfig,
    work: Path,
    metrics: Metrics,
    evaluation: ShardedEvaluation | None = None,
    *,
    share_prompts: bool,
) -> tuple[int, dict[str, Any]]:
    """Train all weights or adapters on the pairs, and write the model to `work/model`.

    Args:
        model: The preference model to train.
        tokenizer: Its tokenizer.
        train: The pairs to train on.
        training: The options of the trainer.
        work: The directory of the run.
        metrics: Receives a row per step.
        evaluation: Evaluates the model in training, where its weights are sharded.
        share_prompts: Whether the model takes packed pairs.

    Returns:
        The number of steps, and the throughput as `fit` returns it.
    """
    from datasets import Dataset
    from trl import RewardConfig

    with quiet_libraries():
        trainer = without_printer(
            soft_reward_trainer(share_prompts=share_prompts)(
                model=model,
                processing_class=tokenizer,
                args=RewardConfig(**training.arguments(work), max_length=None),
                train_dataset=Dataset.from_list([pair.columns() for pair in train]),
                peft_config=training.peft_config(model, classifier=True),
            )
        )
        if evaluation:
            trainer.add_callback(evaluation.callback(trainer, lambda before: metrics.put(0, _metrics_row(before))))
        throughput = fit(trainer, metrics, COLUMNS, name="train-pm")
        if evaluation:
            evaluation.finish(trainer)
    save_finished(trainer, tokenizer, work / "model", keep_adapter=training.keep_adapter)
    return int(trainer.state.global_step), throughput


def _metrics_row(held_out: dict[str, Any]) -> dict[str, float | None]:
    """The held-out metrics as a row of metrics.jsonl."""
    accuracy = held_out["accuracy"]
    return {"held_out_loss": held_out["held_out_loss"], "held_out_accuracy": accuracy and accuracy["value"]}


def estimate(rows: RowFlow, config: TrainPmConfig) -> StepCost:
    """The cost of training on both replies of every pair, `--epochs` times or for `--max-steps`; and of `--fit-head`,
    one forward pass over them, which rank 0 computes."""
    pair = 2 * (rows.prompt_tokens + rows.reply_tokens)
    read = TokenCounts(rows.rows * pair if config.fit_head else 0.0)
    tokens = TokenCounts(read.prompt_tokens, trained_tokens=config.trained_rows(rows.rows) * pair)
    return StepCost(rows.rows, 0, tokens, rows, alone=read)


def run(config: TrainPmConfig) -> dict[str, Any]:
    """Train on a file of pairs. Returns the summary. Raises UsageError, CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model, config.chat_template)
    inputs = config.hash_inputs()
    reading = config.reading(base.path)
    data = read_pairs("train-pm", config, base.path, partial(encode_pair, reading=reading))
    training = config.training_config()
    summary = TrainingJob(
        provenance=provenance(
            "train-pm",
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
        train=lambda work: train_pm(
            base.path,
            data.tokenizer,
            data.train,
            data.held_out,
            training,
            work,
            fitted_head=config.fit_head,
            reading=reading,
        ),
        facts=training.facts(
            "all pairs in a new random order every epoch, in batches of similar length", len(data.train)
        ),
        check=lambda: check_memory("train-pm", base.path, training, config.workload(data.longest)),
    ).run(as_json=config.as_json)
    if summary["note"]:
        console.warn(f"train-pm: {summary['note']}")
    return summary


STAGE = Stage("train-pm", Phase.FEEDBACK, TrainPmConfig, run, estimate, reads=(Preference,), writes=None)
