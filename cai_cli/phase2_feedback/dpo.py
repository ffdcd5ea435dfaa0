"""`cai dpo`: train a policy on comparisons without a preference model (DPO, Rafailov et al. 2023, arXiv 2305.18290).

The paper trains a preference model on the labels of its feedback model and a policy by RL against it (section 4.1). DPO
trains the policy on the same labels directly: its implicit reward, beta * log(pi(reply) / pi_start(reply)), takes the
place of the preference model's score. Labels are soft, as in `train-pm`: the loss is p times that of the pair plus
1 - p times that of the exchanged pair (`dpo_trainer`), so with `--loss sigmoid` the implicit reward's margin converges
to the log-odds of p, and a tie moves nothing. `--loss ipo` is Azar et al. 2023 (arXiv 2310.12036), `--loss robust`
Chowdhury et al. 2024 (arXiv 2403.00409). `--nll` adds the negative log-likelihood of the preferred reply (Pang et
al. 2024, arXiv 2404.19733), because DPO may lower the probability of both replies.

As in `sft`, the end of turn of a reply that was cut off at the length limit carries no loss, because no model wrote it.
The reference is the start model; with `--lora` that is the policy without its adapters.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cai_cli.common import console
from cai_cli.data.schema import JudgedPair, Preference, Prompt, dump_row
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.dpo_checks import PAIR_COLUMNS, PairChecks, check_prompts, open_monitor
from cai_cli.phase2_feedback.dpo_config import DpoConfig
from cai_cli.phase2_feedback.dpo_pairs import PromptedPair, encode_replies, held_out_rewards
from cai_cli.phase2_feedback.dpo_trainer import soft_dpo_trainer
from cai_cli.phase2_feedback.monitor_models import MonitorModel, judged_tokens, pick_monitor_model
from cai_cli.phase2_feedback.preference_data import PreferenceData, read_pairs
from cai_cli.phase2_feedback.rl_monitor import IMPLICIT_COLUMNS, Monitor, PolicyChecks, flagged, logits_of, reference_of
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import provenance
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed, sharding
from cai_cli.training.checkpoints import save_finished, save_start_model
from cai_cli.training.config import TrainingConfig
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.memory_check import check_memory
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob

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
# Metrics of the checks that the manifest has too, before training and of the model that is kept.
REPORTED = ("monitor_score", "held_out_kl", "held_out_reply_tokens", "held_out_cut_off_share")


@dataclass(frozen=True)
class DpoInputs:
    """The models and data of a run.

    Attributes:
        base: Directory of the start model, which is the reference model too.
        data: The pairs and the tokenizer.
        prompts: The held-out prompts that the policy answers at each check.
        monitor_model: The monitor model, or None.
    """

    base: Path
    data: PreferenceData[PromptedPair]
    prompts: Sequence[Prompt]
    monitor_model: MonitorModel | None


def dpo(inputs: DpoInputs, config: DpoConfig, training: TrainingConfig, work: Path) -> dict[str, Any]:
    """Train a policy on pairs by DPO.

    Args:
        inputs: Models and data.
        config: The options of the stage.
        training: The options of the trainer.
        work: A directory; the trained model goes to `work/model`, with the implicit rewards of the held-out pairs and
            the replies of the checks.

    Returns:
        The metrics for the manifest on rank 0; an empty dict on other ranks.

    Raises:
        CaiError: Training fails; see `fit`.
    """
    from cai_cli.models.loading import load_causal_lm

    base, data = inputs.base, inputs.data
    with sharding.announced(training.arguments(work)):
        model = load_causal_lm(base, **training.loading)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *PAIR_COLUMNS, *IMPLICIT_COLUMNS])
    samples = work / "samples.jsonl"
    monitor = open_monitor(
        inputs.prompts, inputs.monitor_model, data.tokenizer, config, training, rows=len(data.train), file=samples
    )
    with quiet_libraries():
        trainer = _trainer(model, inputs, config, training, work)
        on_pairs = PairChecks(trainer, data.held_out, metrics, config.monitor_every)
        trainer.add_callback(on_pairs.callback())
        on_replies = _policy_checks(monitor, trainer, metrics, base, config, training) if monitor else None
        throughput = fit(trainer, metrics, COLUMNS, name="dpo")
        kept = on_replies.kept if on_replies else None
        judged = on_pairs.judged
        if kept is not None:  # the weights are those of an earlier step, or at 0 are to be those of the start model
            judged = held_out_rewards(trainer, data.held_out) if kept else []
        _save(trainer, inputs, work / "model", start=kept == 0, keep_adapter=training.keep_adapter)
    if not distributed.is_rank_zero():
        return {}
    (work / "model/held_out.jsonl").write_bytes(b"".join(dump_row(pair) + b"\n" for pair in judged))
    if monitor:
        shutil.copyfile(samples, work / "model/samples.jsonl")
    steps = int(trainer.state.global_step)
    return {**manifest_metrics(metrics, judged, steps if kept is None else kept), "throughput": throughput}


def _policy_checks(
    monitor: Monitor, trainer: Any, metrics: Metrics, base: Path, config: DpoConfig, training: TrainingConfig
) -> PolicyChecks:
    """The checks of the policy's replies, which are added to the trainer."""
    reference = logits_of(trainer.model)
    if distributed.is_rank_zero():  # which makes the checks
        reference = reference_of(trainer, base, training.frozen_dtype)
    every, stop = config.monitor_every, config.stop_on_goodhart
    checks = PolicyChecks(monitor, trainer, metrics, reference, every=every, stop=stop)
    trainer.add_callback(checks.callback())
    return checks


def _save(trainer: Any, inputs: DpoInputs, directory: Path, *, start: bool, keep_adapter: bool) -> None:
    """Write the policy, or the start model where no step was better."""
    if start:
        save_start_model(inputs.base, inputs.data.tokenizer, directory, keep_adapter=keep_adapter)
    else:
        save_finished(trainer, inputs.data.tokenizer, directory, keep_adapter=keep_adapter)


def manifest_metrics(metrics: Metrics, judged: Sequence[JudgedPair], kept: int) -> dict[str, Any]:
    """The metrics for the manifest, about the model that is kept.

    Args:
        metrics: The metrics of all steps and checks.
        judged: The held-out pairs with the implicit rewards of the model that is kept; empty for the start model.
        kept: The step whose weights are kept, 0 where no step was better than the start model.

    Returns:
        Losses are in nats, `held_out_kl` in nats per token; `_before` marks the start model's.
    """
    trained = [row for row in metrics.rows if row["loss"] is not None]
    last = [row for row in trained if row["step"] <= kept][-1:] or trained[:1]
    checks = [row for row in metrics.rows if row["implicit_reward"] is not None]
    kept_check = next((row for row in checks if row["step"] == kept), None)
    flag = flagged(metrics)
    start_kept = {} if kept else {"note": "No checked step was better than the start model, which is kept."}
    return {
        "steps": metrics.rows[-1]["step"],
        "kept_step": kept,
        "loss_before": trained[0]["loss"],
        **{name: last[0][name] for name in ("loss", "nll")},
        "held_out_margin": fmean(pair.margin for pair in judged) if judged else None,
        **held_out_metrics(judged, "The policy's implicit reward"),
        **{f"{name}_before": checks[0][name] if checks else None for name in REPORTED},
        **{name: kept_check[name] if kept_check else None for name in REPORTED},
        "goodhart": flag["goodhart"] if flag else None,
        "goodhart_step": flag["step"] if flag else None,
        **start_kept,
    }


def _trainer(model: Any, inputs: DpoInputs, config: DpoConfig, training: TrainingConfig, work: Path) -> Any:
    from trl import DPOConfig

    data = inputs.data
    if model.config._name_or_path != str(inputs.base):
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
                precompute_ref_log_probs=not (training.lora_rank and distributed.weights_are_sharded()),
                model_init_kwargs=training.reference_options,
            ),
            train_dataset=_on_disk(data.train, work / "train"),
            eval_dataset=_on_disk(data.held_out, work / "held_out") if data.held_out else None,
            peft_config=training.peft_config(model),
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


def estimate(rows: RowFlow, config: DpoConfig) -> StepCost:
    """The cost of reading both replies of every pair once, training on them `--epochs` times or for `--max-steps`, and
    the checks, which rank 0 makes."""
    whole, new = 2 * (rows.prompt_tokens + rows.reply_tokens), config.max_new_tokens
    held_out = config.eval_share * rows.rows
    steps = math.ceil(config.trained_rows(rows.rows - held_out) / config.rows_per_step)
    checks = -(-steps // config.monitor_every)
    # The reference reads every pair, the policy those held out at each check; both read a reply for the KL divergence.
    checked = int(min(config.monitor_prompts, held_out))
    replies = (1 + checks) * checked
    read = whole * checks * held_out + replies * (3 * rows.prompt_tokens + 2 * new)
    if config.monitor_pm:
        read += replies * (rows.prompt_tokens + new)
    requests = 2 * checks * checked if config.monitor_judge else 0
    read += requests * judged_tokens(rows.prompt_tokens, new)
    tokens = TokenCounts(read + whole * rows.rows, replies * new, whole * steps * config.rows_per_step)
    return StepCost(rows.rows, replies + requests, tokens, rows, alone=TokenCounts(read, replies * new))


def run(config: DpoConfig) -> dict[str, Any]:
    """Train on a file of pairs. Returns the summary. Raises UsageError, CaiError."""
    config.launch()
    base = ModelSource.resolve(config.model, config.chat_template)
    training = config.training_config()
    monitor_model = pick_monitor_model(
        config.monitor_pm, config.monitor_judge, config.base_url, None, device=training.device, seed=config.seed
    )
    hashed = config.hash_inputs()
    data = read_pairs("dpo", config, base.path, encode_replies)
    prompts = check_prompts(data.held_out, config, base.path, monitor_model)
    inputs = DpoInputs(base.path, data, prompts, monitor_model)
    summary = TrainingJob(
        provenance=provenance(
            "dpo",
            inputs=hashed,
            settings=training.settings(config),
            model=base.identity(),
            monitor=monitor_model.identity if monitor_model else None,
            rows=data.rows,
        ),
        inputs=hashed,
        models={"model": base},
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=data.counts,
        train=lambda work: dpo(inputs, config, training, work),
        facts=training.facts(
            "all pairs in a new random order every epoch, in batches of similar length", len(data.train)
        ),
        check=lambda: check_memory("dpo", base.path, training, config.workload(data.longest)),
    ).run(as_json=config.as_json)
    if summary["note"]:
        console.warn(f"dpo: {summary['note']}")
    return summary


STAGE = Stage("dpo", Phase.FEEDBACK, DpoConfig, run, estimate, reads=(Preference,), writes=None)
