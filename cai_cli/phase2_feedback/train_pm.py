"""`cai train-pm`: a preference model from AI-labelled comparisons (paper section 4.1).

As in the paper the targets are soft: the loss is the cross-entropy between p_chosen and sigmoid(r_chosen - r_rejected).
TRL's RewardTrainer knows only hard labels; its loss plus `(1 - p_chosen) * (r_chosen - r_rejected)` is the soft one,
exactly. Departures: the paper starts from a model pretrained on preferences and mixes in human helpfulness labels;
we start from `--model` (a fresh, seeded scalar head on it) and train on the rows given, which may be both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_cli import console, options
from cai_cli.errors import RowError
from cai_cli.intake import Intake
from cai_cli.jsonl import rows_of
from cai_cli.manifest import hash_input, provenance, settings_of
from cai_cli.phase2_feedback.preference_model import Figure, encode_conversation, judge_pairs, score_ids
from cai_cli.records import Preference, conversation_id, reject
from cai_cli.training import (
    Epochs,
    GradientAccumulation,
    LearningRate,
    Lora,
    LoraRank,
    MaxLength,
    MaxSteps,
    Metrics,
    Recipe,
    SaveSteps,
    TrainBatchSize,
    finished_model,
    fit,
    held_out_keys,
    pick_device,
    quiet_libraries,
    save_model,
    without_printer,
)
from cai_cli.training_job import Base, Counts, TrainingJob, rows_digest

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


@dataclass(frozen=True)
class Pair:
    """A preference and the ids of its two conversations."""

    row: Preference
    chosen: list[int]
    rejected: list[int]

    def columns(self) -> dict[str, Any]:
        return {"chosen_ids": self.chosen, "rejected_ids": self.rejected, "p_chosen": self.row.p_chosen}


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Preference], max_length: int, counts: Counts
) -> list[Pair]:
    """Every pair that can be trained on; the others are rejected into `counts`."""
    pairs = []
    for row in rows:
        try:
            pair = Pair(
                row,
                encode_conversation(tokenizer, [*row.prompt, *row.chosen]),
                encode_conversation(tokenizer, [*row.prompt, *row.rejected]),
            )
        except RowError as error:
            counts.rejected.append(reject(row.key, error.message, row))
            continue
        if max(len(pair.chosen), len(pair.rejected)) > max_length:
            counts.rejected.append(reject(row.key, "longer than --max-length", row))
        elif pair.chosen == pair.rejected:
            counts.rejected.append(reject(row.key, "chosen and rejected are the same", row))
        else:
            pairs.append(pair)
    return pairs


def judge(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair], batch_size: int
) -> Figure:
    """Loss and accuracy of a preference model on pairs."""
    chosen = score_ids(model, tokenizer, [p.chosen for p in pairs], batch_size)
    rejected = score_ids(model, tokenizer, [p.rejected for p in pairs], batch_size)
    return judge_pairs([p.row for p in pairs], chosen, rejected)


def soft_reward_trainer() -> Any:
    """RewardTrainer with soft targets: its rows carry `p_chosen`, the probability that `chosen` is the better one."""
    import torch
    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            p_chosen = torch.tensor([example["p_chosen"] for example in examples], dtype=torch.float32)
            return {**super().torch_call(examples), "p_chosen": p_chosen}

    class SoftRewardTrainer(RewardTrainer):  # type: ignore[misc]
        loss_is_scaled_for_ga = False  # a mean over the batch

        def __init__(self, *, processing_class: Any, **arguments: Any) -> None:
            collator = Collator(pad_token_id=processing_class.pad_token_id)
            super().__init__(processing_class=processing_class, data_collator=collator, **arguments)

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "p_chosen"]

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            p_chosen = inputs.pop("p_chosen")
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
            # -log sigmoid(d) + (1 - p) d  =  -p log sigmoid(d) - (1 - p) log sigmoid(-d)
            loss = loss + ((1 - p_chosen) * (chosen - rejected)).mean()
            return (loss, outputs) if return_outputs else loss

    return SoftRewardTrainer


def train_pm(
    base: Path,
    tokenizer: "PreTrainedTokenizerBase",
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    recipe: Recipe,
    work: Path,
) -> dict[str, Any]:
    """Train a preference model from the model in `base`; the finished one is left in `work/model`. Returns figures."""
    from datasets import Dataset
    from trl import RewardConfig

    from cai_cli.models import load_reward_model

    model = load_reward_model(base, "float32", recipe.device, new_head_seed=recipe.seed)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *HELD_OUT])
    # Judged anew also when a run is resumed: it is the untrained model that is loaded here.
    before = judge(model, tokenizer, held_out, recipe.batch_size)
    if metrics.at(0) is None:
        metrics.put(0, held_out_row(before))
    with quiet_libraries():
        trainer = without_printer(
            soft_reward_trainer()(
                model=model,
                processing_class=tokenizer,
                args=RewardConfig(**recipe.arguments(work), max_length=None),
                train_dataset=Dataset.from_list([pair.columns() for pair in train]),
                peft_config=recipe.peft_config(classifier=True),
            )
        )
        fit(trainer, metrics, COLUMNS, name="train-pm")
    model = finished_model(trainer)
    after = judge(model, tokenizer, held_out, recipe.batch_size)
    steps = int(trainer.state.global_step)
    metrics.put(steps, held_out_row(after))
    save_model(model, tokenizer, work / "model")
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {
        "steps": steps,
        "loss_before": losses[0],
        "loss": losses[-1],
        "held_out_loss_before": before["loss"],
        "held_out_loss": after["loss"],
        "accuracy_before": before["accuracy"],
        "accuracy": after["accuracy"],
    }


def held_out_row(figures: Figure) -> dict[str, float | None]:
    accuracy = figures["accuracy"]
    return {"held_out_loss": figures["loss"], "held_out_accuracy": accuracy and accuracy["value"]}


def command(
    input: options.Input,
    output: options.ModelOutput,
    model: options.Model = options.DEFAULT_MODEL,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    batch_size: TrainBatchSize = 4,
    gradient_accumulation: GradientAccumulation = 2,
    learning_rate: LearningRate = 2e-5,
    max_length: MaxLength = 1024,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    eval_share: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of the prompts held out.")] = 0.1,
    save_steps: SaveSteps = 100,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    skip_bad: options.SkipBad = False,
    max_bad: options.MaxBad = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a preference model on comparisons.

    INPUT: Preference rows, from `cai label-prefs`. Writes a model directory.
    """
    flags = locals()
    console.set_quiet(quiet)
    from cai_cli.models import load_tokenizer

    base = Base.resolve(model)
    inputs = {"preferences": hash_input(input)}
    intake = Intake.of(flags)
    rows = [row for _, row in intake.rows(input, rows_of(Preference), limit)]
    tokenizer = load_tokenizer(base.path)
    counts = Counts(rejected=intake.take_bad())
    pairs = encode_pairs(tokenizer, rows, max_length, counts)
    apart = held_out_keys([conversation_id(pair.row.prompt) for pair in pairs], eval_share, seed)
    train = [pair for pair in pairs if conversation_id(pair.row.prompt) not in apart]
    held_out = [pair for pair in pairs if conversation_id(pair.row.prompt) in apart]
    counts.train, counts.held_out = len(train), len(held_out)
    where = pick_device(device)
    recipe = Recipe(
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        save_steps=save_steps,
        seed=seed,
        device=where,
        lora_rank=lora_rank if lora else None,
        epochs=epochs,
        max_steps=max_steps,
    )
    settings = settings_of(flags, batch_size=batch_size, precision="float32" if where == "cpu" else "bfloat16")
    del settings["save_steps"]
    TrainingJob(
        provenance=provenance(
            "train-pm",
            inputs=inputs,
            settings=settings,
            model={"fingerprint": base.fingerprint},
            rows=rows_digest(rows),
        ),
        inputs=inputs,
        models={"model": base},
        output=output,
        overwrite=overwrite,
        counts=counts,
        train=lambda work: train_pm(base.path, tokenizer, train, held_out, recipe, work),
    ).run(as_json=json)
