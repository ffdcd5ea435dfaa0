"""`cai train-pm`: a preference model from comparisons (paper sections 4.1 and 4.2).

As in the paper the targets are soft: the loss is the cross-entropy between p_chosen and sigmoid(r_chosen - r_rejected).
TRL's RewardTrainer knows only hard labels; its loss plus `(1 - p_chosen) * (r_chosen - r_rejected)` is the soft one,
exactly. As in the paper the harmlessness comparisons of an AI are mixed with helpfulness comparisons of humans
(`--mix`; the paper has 135k of these to 183k of those). Departure: the paper starts from a model pretrained on
preferences, we from `--model` with a scalar head that is random (seeded) or fitted first (`--fit-head`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.data.formats import parse_preference
from cai_cli.data.jsonl import origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import JudgedPair, Preference, conversation_id, dump_row, reject
from cai_cli.data.splits import held_out_keys, mixed, too_long_for
from cai_cli.engines.tokenization import encode_text
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.loading import tokenizer_and_window
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.linear_probe import fit_head
from cai_cli.phase2_feedback.pm_trainer import soft_reward_trainer
from cai_cli.reward.packed_pairs import score_pairs, take_packed_pairs
from cai_cli.reward.preference_model import encode_conversation, score_ids
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, DType, EngineOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed
from cai_cli.training.checkpoints import save_finished, save_model
from cai_cli.training.config import (
    TrainingConfig,
)
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.options import EpochOptions
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob, rows_digest

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


class Targets(StrEnum):
    """What the preference model is trained towards."""

    SOFT = "soft"
    HARD = "hard"


class TrainPmConfig(EpochOptions):
    """Train a preference model on comparisons.

    INPUT: Preference rows, from `cai label-prefs`, or pairs labelled by humans (HH-RLHF `chosen` and `rejected`).
    Writes a model directory, with the scores of the held-out pairs in `held_out.jsonl`.
    """

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    dtype: DType = redefine(EngineOptions, "dtype", DType.AUTO)
    mix: str | None = option(
        None,
        "JSONL of further comparisons, such as human helpfulness labels, to mix in.",
        Option(Effect.HASHED, reads_file=True),
    )
    mix_ratio: float = option(1.0, "Pairs of --mix for each pair of INPUT.", ge=0.0)
    targets: Targets = option(
        Targets.SOFT, "Train on the labels' probabilities, as the paper does, or on 1 for the preferred reply."
    )
    fit_head: bool = option(
        False,
        "Start from the linear head that fits the labels best on the frozen model; --epochs 0 trains nothing else.",
        Option(flags=("--fit-head/--random-head",)),
    )
    eval_share: float = redefine(EpochOptions, "eval_share", 0.1)

    def check(self) -> None:
        super().check()
        if not (self.epochs or self.max_steps or self.fit_head):
            raise UsageError(
                "--epochs 0 trains nothing", hint="with --fit-head it trains the head alone", code="option-conflict"
            )


@dataclass(frozen=True)
class EncodedPair:
    """A preference, the ids of its two conversations, and the probability of `chosen` that is trained on."""

    row: Preference
    chosen: list[int]
    rejected: list[int]
    target: float

    @property
    def ids(self) -> tuple[list[int], list[int]]:
        return self.chosen, self.rejected

    def columns(self) -> dict[str, Any]:
        return {"chosen_ids": self.chosen, "rejected_ids": self.rejected, "p_chosen": self.target}


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Preference],
    max_length: int,
    counts: Counts,
    *,
    window: int,
    hard: bool,
) -> list[EncodedPair]:
    """Every pair that can be trained on; the others are rejected into `counts`.

    `window`: how many tokens the model takes. With `hard` the preferred reply has probability 1, and a tie, which has
    no preferred reply, is skipped.
    """
    pairs, too_long = [], too_long_for(max_length, window)
    for row in rows:
        try:
            ids = [encode_conversation(tokenizer, [*row.prompt, *reply]) for reply in (row.chosen, row.rejected)]
        except RowError as error:
            counts.reject(reject(row.key, error.message, row))
            continue
        if max(map(len, ids)) > min(max_length, window):
            counts.reject(reject(row.key, too_long, row))
        elif ids[0] == ids[1]:
            counts.reject(reject(row.key, "chosen and rejected are the same", row))
        elif hard and row.p_chosen == 0.5:
            counts.skipped["a tie, which has no hard target"] += 1
        else:
            pairs.append(EncodedPair(row, ids[0], ids[1], 1.0 if hard else row.p_chosen))
    return pairs


def judge(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[EncodedPair],
    batch_size: int,
    *,
    share_prompts: bool,
) -> list[JudgedPair]:
    """The pairs with the scores a preference model gives."""
    if share_prompts:
        chosen, rejected = score_pairs(model, [pair.ids for pair in pairs], batch_size)
    else:
        chosen = score_ids(model, tokenizer, [pair.chosen for pair in pairs], batch_size)
        rejected = score_ids(model, tokenizer, [pair.rejected for pair in pairs], batch_size)

    def tokens(text: str) -> int:
        return len(encode_text(tokenizer, text, start=False))

    return [
        JudgedPair(
            id=row.id,
            source=row.source,
            p_chosen=row.p_chosen,
            chosen_score=a,
            rejected_score=b,
            chosen_tokens=tokens(row.chosen[0].content),
            rejected_tokens=tokens(row.rejected[0].content),
        )
        for row, a, b in zip((pair.row for pair in pairs), chosen, rejected, strict=True)
    ]


def train_pm(
    base: Path,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    training: TrainingConfig,
    work: Path,
    *,
    fitted_head: bool,
) -> dict[str, Any]:
    """Train a preference model from the model in `base`; the finished one is left in `work/model`, with the scores of
    the held-out pairs beside it in `held_out.jsonl`. Returns the figures."""
    from cai_cli.models.loading import load_reward_model

    longest = max([*train, *held_out], key=lambda pair: max(len(pair.chosen), len(pair.rejected)))
    model = load_reward_model(base, "float32", training.device, new_head_seed=training.seed)
    share = take_packed_pairs(model, longest.ids)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *HELD_OUT])
    # Fitted and judged anew also when a run is resumed: it is the untrained model that is loaded here.
    head = start_head(model, train, training, share_prompts=share) if fitted_head else {}
    before, steps, throughput = held_out_metrics([]), 0, dict[str, Any]()
    if training.trains:
        before = distributed.from_leader(
            lambda: judged_before(model, tokenizer, held_out, training, share_prompts=share)
        )
        if metrics.at(0) is None:
            metrics.put(0, held_out_row(before))
        steps, throughput = fine_tune(model, tokenizer, train, training, work, metrics, share_prompts=share)
    elif distributed.leads():
        save_model(model, tokenizer, work / "model")
    if not distributed.leads():
        return {}
    # Judged as others will load it: training may have run in bfloat16.
    model = load_reward_model(work / "model", "float32", training.device)
    share = share and take_packed_pairs(model, longest.ids)
    judged = judge(model, tokenizer, held_out, training.batch_size, share_prompts=share)
    (work / "model/held_out.jsonl").write_bytes(b"".join(dump_row(pair) + b"\n" for pair in judged))
    figures = held_out_metrics(judged)
    metrics.put(steps, held_out_row(figures))
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {
        "steps": steps,
        **head,
        "loss_before": losses[0] if losses else None,
        "loss": losses[-1] if losses else None,
        "held_out_loss_before": before["held_out_loss"],
        "accuracy_before": before["accuracy"],
        **figures,
        "pairs_by_source": dict(Counter(pair.row.source or "no source" for pair in train)),
        "throughput": throughput,
    }


def judged_before(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    held_out: Sequence[EncodedPair],
    training: TrainingConfig,
    *,
    share_prompts: bool,
) -> dict[str, Any]:
    """The figures of the model that training starts from."""
    with training.autocast():
        return held_out_metrics(judge(model, tokenizer, held_out, training.batch_size, share_prompts=share_prompts))


def start_head(
    model: "PreTrainedModel", train: Sequence[EncodedPair], training: TrainingConfig, *, share_prompts: bool
) -> dict[str, Any]:
    """Give the model a head fitted to the pairs, by rank 0; the figures of its cross-validation. Raises CaiError."""
    if not share_prompts:
        raise CaiError("--fit-head needs a decoder whose layers are all full attention", hint="--random-head")

    def fitted() -> tuple[dict[str, Any], Any]:
        with training.autocast():
            figures = fit_head(
                model,
                [pair.ids for pair in train],
                [pair.target for pair in train],
                [conversation_id(pair.row.prompt) for pair in train],
                training.batch_size,
            )
        return figures, model.score.weight.data.cpu()

    figures, weight = distributed.from_leader(fitted)
    model.score.weight.data.copy_(weight)
    return figures


def fine_tune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[EncodedPair],
    training: TrainingConfig,
    work: Path,
    metrics: Metrics,
    *,
    share_prompts: bool,
) -> tuple[int, dict[str, Any]]:
    """Take the recipe's steps and leave the model in `work/model`; how many they were, and their throughput."""
    from datasets import Dataset
    from trl import RewardConfig

    with quiet_libraries():
        trainer = without_printer(
            soft_reward_trainer(share_prompts=share_prompts)(
                model=model,
                processing_class=tokenizer,
                args=RewardConfig(**training.arguments(work), max_length=None),
                train_dataset=Dataset.from_list([pair.columns() for pair in train]),
                peft_config=training.peft_config(classifier=True),
            )
        )
        throughput = fit(trainer, metrics, COLUMNS, name="train-pm")
    save_finished(trainer, tokenizer, work / "model")
    return int(trainer.state.global_step), throughput


def held_out_row(figures: dict[str, Any]) -> dict[str, float | None]:
    accuracy = figures["accuracy"]
    return {"held_out_loss": figures["held_out_loss"], "held_out_accuracy": accuracy and accuracy["value"]}


def read_preferences(reader: RowReader, source: str, limit: int | None = None) -> list[Preference]:
    """Preference rows and pairs that humans labelled; such a pair without a source has the file's name."""
    name = origin(source)
    return [row for _, row in reader.rows(source, lambda value: parse_preference(value, source=name), limit)]


@dataclass(frozen=True)
class PreferenceData:
    """The pairs of a run, and what identifies the rows they come from."""

    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    tokenizer: "PreTrainedTokenizerBase"
    counts: Counts
    rows: dict[str, Any]


def read_pairs(config: TrainPmConfig, base: Path) -> PreferenceData:
    """Read, mix, encode and split the pairs. Raises CaiError."""
    reader, mix_reader = config.row_reader(), config.row_reader()
    mine = read_preferences(reader, config.input, config.limit)
    theirs = read_preferences(mix_reader, config.mix) if config.mix else []
    rows = mixed(mine, theirs, config.mix_ratio, seed_for(config.seed, "train-pm", "mix"))
    counts = Counts.of_training([*reader.take_invalid(), *mix_reader.take_invalid()])
    if left := len(mine) + len(theirs) - len(rows):
        counts.skipped["beyond --mix-ratio"] = left
    if config.mix and len(theirs) < round(config.mix_ratio * len(mine)):
        console.say(f"train-pm: {config.mix} has {len(theirs):,} pairs, fewer than --mix-ratio requests; all are used")
    tokenizer, window = tokenizer_and_window(base)
    hard = config.targets is Targets.HARD
    pairs = encode_pairs(tokenizer, rows, config.max_length, counts, window=window, hard=hard)
    apart = held_out_keys([conversation_id(pair.row.prompt) for pair in pairs], config.eval_share, config.seed)
    train = [pair for pair in pairs if conversation_id(pair.row.prompt) not in apart]
    held_out = [pair for pair in pairs if conversation_id(pair.row.prompt) in apart]
    counts.train, counts.held_out = len(train), len(held_out)
    return PreferenceData(train, held_out, tokenizer, counts, rows_digest([*mine, *theirs]))


def estimate(rows: RowFlow, config: TrainPmConfig) -> StepCost:
    """The cost of training on both replies of every pair, `--epochs` times."""
    tokens = 2 * rows.rows * (rows.prompt_tokens + rows.reply_tokens) * config.epochs
    return StepCost(rows.rows, 0, TokenCounts(trained_tokens=tokens), rows)


def run(config: TrainPmConfig) -> dict[str, Any]:
    """Train on a file of pairs. Returns the summary. Raises CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model)
    inputs = {"preferences": hash_input(config.input)}
    if config.mix:
        inputs["mix"] = hash_input(config.mix)
    data = read_pairs(config, base.path)
    training = config.training_config(dtype=config.dtype.value)
    summary = TrainingJob(
        provenance=provenance(
            "train-pm",
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
        train=lambda work: train_pm(
            base.path, data.tokenizer, data.train, data.held_out, training, work, fitted_head=config.fit_head
        ),
        facts=training.facts("all pairs in a new random order every epoch, in batches of like length", len(data.train)),
    ).run(as_json=config.as_json)
    if summary["note"]:
        console.warn(f"train-pm: {summary['note']}")
    return summary


STAGE = Stage("train-pm", Phase.FEEDBACK, TrainPmConfig, run, estimate, reads=(Preference,), writes=None)
