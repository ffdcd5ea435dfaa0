"""`cai dpo`: train a policy on comparisons without a preference model (DPO, Rafailov et al. 2023, arXiv 2305.18290).

The paper trains a preference model on the labels of its feedback model and a policy by RL against it (section 4.1). DPO
trains the policy on the same labels directly: its implicit reward, beta * log(pi(reply) / pi_start(reply)), takes the
place of the preference model's score. Labels are soft, as in `train-pm`: the loss is p times that of the pair plus
1 - p times that of the exchanged pair (`dpo_trainer`), so with `--loss sigmoid` the implicit reward's margin converges
to the log-odds of p, and a tie moves nothing. `--loss ipo` is Azar et al. 2023 (arXiv 2310.12036), `--loss robust`
Chowdhury et al. 2024 (arXiv 2403.00409). `--nll` adds the likelihood of the preferred reply (Pang et al. 2024, arXiv
2404.19733), because DPO may lower the probability of both replies.

As in `sft`, the end of turn of a reply that was cut off at the length limit carries no loss, because no model wrote it.
The reference is the start model; with `--lora` that is the policy without its adapters.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import JudgedPair, Message, Preference, conversation_id, dump_row
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.dpo_config import DpoConfig
from cai_cli.phase2_feedback.dpo_trainer import soft_dpo_trainer
from cai_cli.phase2_feedback.pm_pairs import EncodedPair
from cai_cli.phase2_feedback.preference_data import PreferenceData, read_pairs
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import provenance
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed
from cai_cli.training.checkpoints import save_finished
from cai_cli.training.completions import encode
from cai_cli.training.config import TrainingConfig
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {
    "epoch": "epoch",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "nll": "nll",
    "entropy": "entropy",
}
HELD_OUT = ("held_out_loss", "held_out_accuracy", "held_out_margin")


@dataclass(frozen=True)
class PromptedPair(EncodedPair):
    """A preference, encoded as a prompt with two replies.

    Attributes:
        prompt_length: Number of leading ids of both conversations that belong to the prompt and carry no loss.
    """

    prompt_length: int

    def columns(self) -> dict[str, Any]:
        n = self.prompt_length
        ids = {"prompt_ids": self.chosen[:n], "chosen_ids": self.chosen[n:], "rejected_ids": self.rejected[n:]}
        return ids | {"p_chosen": self.target}


def encode_replies(tokenizer: "PreTrainedTokenizerBase", row: Preference) -> PromptedPair:
    """Encode a prompt and two replies, without the end of turn of a reply that was cut off. Raises RowError."""

    def encoded(reply: Sequence[Message], finish_reason: str | None) -> tuple[list[int], int]:
        both = encode(tokenizer, row.prompt, reply[0].content.strip(), close=finish_reason != CUT_OFF)
        return both.ids, both.prompt_length

    chosen, length = encoded(row.chosen, row.chosen_finish_reason)
    rejected, _ = encoded(row.rejected, row.rejected_finish_reason)
    return PromptedPair(row, chosen, rejected, row.p_chosen, length)


def dpo(
    base: Path, data: PreferenceData[PromptedPair], config: DpoConfig, training: TrainingConfig, work: Path
) -> dict[str, Any]:
    """Train a policy on pairs by DPO.

    Args:
        base: Directory of the start model, which is the reference model too.
        data: The pairs and the tokenizer.
        config: The options of the stage.
        training: The options of the trainer.
        work: A directory; the trained model goes to `work/model`, with the implicit rewards of the held-out pairs.

    Returns:
        The metrics for the manifest (losses and margins in nats) on rank 0; an empty dict on other ranks.

    Raises:
        CaiError: Training fails; see `fit`.
    """
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *HELD_OUT])
    with quiet_libraries():
        trainer = _trainer(base, data, config, training, work)
        throughput = fit(trainer, metrics, COLUMNS, name="dpo")
        judged = held_out_rewards(trainer, data)
        save_finished(trainer, data.tokenizer, work / "model")
    after = held_out_metrics(judged)
    metrics.put(int(trainer.state.global_step), _metrics_row(judged, after))
    if not distributed.is_rank_zero():
        return {}
    (work / "model/held_out.jsonl").write_bytes(b"".join(dump_row(pair) + b"\n" for pair in judged))
    losses = [row["loss"] for row in metrics.rows if row["loss"] is not None]
    return {
        "steps": int(trainer.state.global_step),
        "loss_before": losses[0],
        "loss": losses[-1],
        "throughput": throughput,
        **after,
    }


def _trainer(
    base: Path, data: PreferenceData[PromptedPair], config: DpoConfig, training: TrainingConfig, work: Path
) -> Any:
    from trl import DPOConfig

    from cai_cli.models.loading import load_causal_lm

    model = load_causal_lm(base, "float32", training.device)
    if model.config._name_or_path != str(base):
        raise AssertionError("TRL would load the reference model from another directory")
    return without_printer(
        soft_dpo_trainer(config.nll)(
            model=model,
            processing_class=data.tokenizer,
            args=DPOConfig(
                **training.arguments(work),
                max_length=None,
                loss_type=[config.loss.value],
                beta=config.beta,
                label_smoothing=config.smoothing,
                precompute_ref_log_probs=True,
            ),
            train_dataset=_on_disk(data.train, work / "train"),
            eval_dataset=_on_disk(data.held_out, work / "held_out") if data.held_out else None,
            peft_config=training.peft_config(),
        )
    )


def _on_disk(pairs: Sequence[PromptedPair], directory: Path) -> Any:
    """The pairs as a dataset in a directory, which is written where it is missing.

    TRL stores the reference log-probabilities beside the files of the dataset. There every process finds them, and a
    resumed run.
    """
    from datasets import Dataset, load_from_disk

    def write() -> None:
        if not directory.exists():
            partial = directory.with_name(f"{directory.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            Dataset.from_list([pair.columns() for pair in pairs]).save_to_disk(partial)
            partial.rename(directory)

    distributed.from_rank_zero(write)
    return load_from_disk(str(directory))


def held_out_rewards(trainer: Any, data: PreferenceData[PromptedPair]) -> list[JudgedPair]:
    """Return the held-out pairs with the policy's implicit rewards as their scores. Called on every rank."""
    if not data.held_out:
        return []
    rewards = trainer.predict(trainer.eval_dataset).predictions.tolist()
    return [
        JudgedPair(
            id=pair.row.id,
            prompt_id=conversation_id(pair.row.prompt),
            source=pair.row.source,
            p_chosen=pair.row.p_chosen,
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_tokens=len(pair.chosen) - pair.prompt_length,
            rejected_tokens=len(pair.rejected) - pair.prompt_length,
        )
        for pair, (chosen, rejected) in zip(data.held_out, rewards, strict=True)
    ]


def _metrics_row(judged: Sequence[JudgedPair], held_out: dict[str, Any]) -> dict[str, float | None]:
    """The held-out metrics as a row of metrics.jsonl."""
    accuracy = held_out["accuracy"]
    return {
        "held_out_loss": held_out["held_out_loss"],
        "held_out_accuracy": accuracy and accuracy["value"],
        "held_out_margin": fmean(pair.margin for pair in judged) if judged else None,
    }


def estimate(rows: RowFlow, config: DpoConfig) -> StepCost:
    """The cost of training on both replies of every pair, `--epochs` times, and of reading them once before."""
    tokens = 2 * rows.rows * (rows.prompt_tokens + rows.reply_tokens)
    return StepCost(rows.rows, 0, TokenCounts(tokens, 0, tokens * config.epochs), rows)


def run(config: DpoConfig) -> dict[str, Any]:
    """Train on a file of pairs. Returns the summary. Raises UsageError, CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model)
    inputs = config.hash_inputs()
    data = read_pairs("dpo", config, base.path, encode_replies, hard=config.hard)
    training = config.training_config()
    summary = TrainingJob(
        provenance=provenance(
            "dpo", inputs=inputs, settings=training.settings(config), model=base.identity(), rows=data.rows
        ),
        inputs=inputs,
        models={"model": base},
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=data.counts,
        train=lambda work: dpo(base.path, data, config, training, work),
        facts=training.facts(
            "all pairs in a new random order every epoch, in batches of similar length", len(data.train)
        ),
    ).run(as_json=config.as_json)
    if summary["note"]:
        console.warn(f"dpo: {summary['note']}")
    return summary


STAGE = Stage("dpo", Phase.FEEDBACK, DpoConfig, run, estimate, reads=(Preference,), writes=None)
