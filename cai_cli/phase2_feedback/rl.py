"""`cai rl`: train a policy against a preference model (paper section 4.1 and 4.2, the RL-CAI model).

The objective is the paper's: the preference model's score of the reply less beta times the KL divergence from the
model RL starts from, on red-team prompts mixed with helpful ones. Departures: the paper uses PPO with a critic, which
TRL no longer has. RLOO (the default) subtracts beta * KL from the score as PPO does and takes the mean score of the
other replies to the prompt where PPO has the critic; `--algorithm grpo` puts the KL into the loss. A reply cut at the
length limit loses `--cutoff-penalty`: the preference model sees every reply closed by the chat template and could not
tell.

Scores are standardised: in their unit the start model's replies to the held-out prompts have mean 0 and standard
deviation 1 (both constants stand in the manifest). beta, in that unit per nat, and the penalty then mean the same for
every preference model, also for one whose labels were clamped to 40-60% and whose margins are at most ln 1.5 = 0.405.

Replies are sampled as `cai sample` does it and not by TRL: with the same seed a run has the same prompts, replies and
rewards on one process and on several, but for rounding.

Every `--monitor-every` steps the policy answers the held-out prompts: `rl_monitor` says what is measured, `goodhart`
when the preference model is no longer a measure.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.data.schema import Prompt
from cai_cli.data.splits import mixed
from cai_cli.engines.base import Sampling
from cai_cli.models.loading import pick_device
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.monitor_models import MonitorModel, Score, pick_monitor_model, preference_score
from cai_cli.phase2_feedback.rl_monitor import (
    CHECK_COLUMNS,
    Monitor,
    RewardNormalizer,
    checks_callback,
    flagged,
    logits_of,
    reference_of,
)
from cai_cli.phase2_feedback.rl_prompts import fitting_prompts, hold_out, prompt_order
from cai_cli.phase2_feedback.rl_trainer import end_ids, preference_reward, with_our_text
from cai_cli.reward.scorer import PreferenceModelOptions
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, StepCost, TokenCounts
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import sidecar
from cai_cli.runtime.shared_options import DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, EngineOptions, SamplingOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed
from cai_cli.training.checkpoints import save_finished, save_model
from cai_cli.training.config import TrainingConfig
from cai_cli.training.cpu_logprobs import use_plain_head
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.options import TrainerOptions
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob, rows_digest

COLUMNS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "score",
    "reward_std": "score_std",
    "shaped_reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "reply_tokens": "completions/mean_length",
    "cut_off_share": "cut_off_share",
}


class Algorithm(StrEnum):
    """The policy-gradient algorithm."""

    RLOO = "rloo"
    GRPO = "grpo"


class Reporter(StrEnum):
    """Where metrics are logged besides metrics.jsonl."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"


class RlConfig(TrainerOptions, PreferenceModelOptions):
    """Train a policy by RL against a preference model.

    INPUT: prompts in any form that `cai sample` takes. Writes a model directory.
    """

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    helpful: str | None = option(
        None, "Helpful prompts to mix in, in any form that INPUT may have.", Option(Effect.HASHED, reads_file=True)
    )
    helpful_ratio: float = option(1.0, "Helpful prompts for each prompt of INPUT.", ge=0.0)
    algorithm: Algorithm = option(
        Algorithm.RLOO, "Leave-one-out baseline with beta * KL in the reward, as in the paper, or GRPO."
    )
    beta: float = option(
        0.05, "Weight of the KL divergence from --model, in standard deviations of the score per nat.", ge=0.0
    )
    steps: int = option(100, "Training steps.", ge=1)
    prompts_per_step: int = option(4, "Prompts in one step.", ge=1)
    samples_per_prompt: int = option(4, "Replies to each prompt of a step, compared as a group.", ge=2)
    batch_size: int | None = option(
        None,
        "Replies in one forward pass of one process; by default all of its share of a step.",
        Option(Effect.HARMLESS, Group.TRAINING),
        ge=1,
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 128)
    temperature: float = option(1.0, "Sampling temperature.", Option(group=Group.SAMPLING), ge=0.01)
    cutoff_penalty: float = option(
        1.0, "Subtracted from the standardised score of a reply that is cut off at the length limit.", ge=0.0
    )
    learning_rate: float = redefine(TrainerOptions, "learning_rate", 1e-6)
    held_out: int = option(32, "Prompts held out to check the policy; at most half of them.", ge=1)
    monitor_every: int = option(10, "Steps between checks on the held-out prompts.", ge=1)
    monitor_pm: str | None = option(
        None,
        "A second preference model that is not used as the reward; it scores the checks.",
        Option(Effect.HASHED, aliases=("watch-pm",)),
    )
    monitor_judge: str | None = option(
        None,
        "A judge that is not used as the reward; it compares the replies of the checks with those of --model.",
        Option(Effect.HASHED, aliases=("watch-judge",)),
    )
    base_url: str | None = redefine(EngineOptions, "base_url", None)
    stop_on_goodhart: bool = option(
        False,
        "Stop at a flagged check and keep the best policy before it.",
        Option(flags=("--stop-on-goodhart",)),
    )
    report_to: Reporter | None = option(
        None, "Also log to tensorboard or trackio.", Option(Effect.HARMLESS, Group.OUTPUT)
    )
    save_steps: int = redefine(TrainerOptions, "save_steps", 25)

    @property
    def replies(self) -> int:
        """Replies in one step."""
        return self.prompts_per_step * self.samples_per_prompt

    def check(self) -> None:
        super().check()
        if self.report_to and find_spec(self.report_to) is None:
            raise UsageError(
                f"--report-to {self.report_to}: not installed",
                hint=f"pip install {self.report_to}",
                code="missing-dependency",
            )

    def training_config(self) -> TrainingConfig:
        """These options as a trainer takes them. Raises UsageError, CaiError."""
        share = _share(self.replies, self.batch_size)
        return TrainingConfig(
            batch_size=self.batch_size or share,
            gradient_accumulation=share // (self.batch_size or share),
            learning_rate=self.learning_rate,
            save_steps=self.save_steps,
            seed=self.seed,
            device=pick_device(self.device),
            lora_rank=self.lora_rank if self.lora else None,
            max_steps=self.steps,
            schedule="constant",
            report_to=self.report_to,
        )


@dataclass(frozen=True)
class RlInputs:
    """What a run trains with: model directories, prompts, and the monitor model."""

    base: Path
    preference_model: Path
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    monitor_model: MonitorModel | None


def rl(inputs: RlInputs, config: RlConfig, training: TrainingConfig, work: Path) -> dict[str, Any]:
    """Train the policy.

    Args:
        inputs: Models and prompts. The reference model is loaded from `inputs.base` too, which must hold exactly the
            weights that training starts from.
        config: The options of the stage.
        training: The options of the trainer.
        work: A directory; the trained model is written to `work/model`.

    Returns:
        The metrics of the manifest.

    Raises:
        UsageError: The weights are sharded.
        CaiError: The preference model cannot tell the replies of the start model apart, or training fails.
    """
    from cai_cli.models.loading import load_causal_lm, load_tokenizer

    if distributed.weights_are_sharded():
        raise UsageError(
            "rl needs the whole policy in every process, to sample from it and to check it",
            hint="--accelerate-config multi_gpu, zero1 or zero2; --lora takes less memory",
            code="sharded-weights",
        )
    base = inputs.base
    policy, tokenizer = load_causal_lm(base, "float32", training.device), load_tokenizer(base)
    if policy.config._name_or_path != str(base):
        raise AssertionError("the reference model would be loaded from elsewhere")
    score = preference_score(inputs.preference_model, training.device, training.batch_size)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *CHECK_COLUMNS])
    monitor = _open_monitor(inputs, config, training, tokenizer, score, work)
    if not metrics.at(0):
        metrics.put(0, distributed.from_leader(lambda: monitor.check(0, policy, logits_of(policy))))
    normalizer = distributed.from_leader(lambda: monitor.normalizer)
    with quiet_libraries():
        reward = preference_reward(score, normalizer, end_ids(policy, tokenizer), config.cutoff_penalty)
        trainer = _policy_trainer(inputs, config, training, work, policy, tokenizer, reward)
        checks = checks_callback(
            monitor,
            trainer,
            metrics,
            reference_of(trainer, base),
            every=config.monitor_every,
            stop=config.stop_on_goodhart,
        )
        trainer.add_callback(checks)
        throughput = fit(trainer, metrics, COLUMNS, name="rl")
    kept = checks.kept if checks.kept is not None else int(trainer.state.global_step)
    if kept:
        save_finished(trainer, tokenizer, work / "model")
    elif distributed.leads():
        save_model(load_causal_lm(base, "float32", training.device), tokenizer, work / "model")
    if distributed.leads():
        shutil.copyfile(work / "samples.jsonl", work / "model/samples.jsonl")
    return {**figures(metrics, normalizer, kept), "throughput": throughput}


def _open_monitor(
    inputs: RlInputs, config: RlConfig, training: TrainingConfig, tokenizer: Any, score: Score, work: Path
) -> Monitor:
    monitor_model = inputs.monitor_model
    return Monitor(
        inputs.held_out,
        tokenizer,
        score,
        monitor_model.open() if monitor_model and distributed.leads() else None,
        work / "samples.jsonl",
        Sampling(config.max_new_tokens, config.temperature),
        training.seed,
        training.batch_size,
    )


def _policy_trainer(
    inputs: RlInputs, config: RlConfig, training: TrainingConfig, work: Path, policy: Any, tokenizer: Any, reward: Any
) -> Any:
    """TRL's trainer, with replies sampled as `cai sample` does and prompts in our order."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    assert training.max_steps  # noqa: S101
    trainer_class, config_class = {
        Algorithm.RLOO: (RLOOTrainer, RLOOConfig),
        Algorithm.GRPO: (GRPOTrainer, GRPOConfig),
    }[config.algorithm]
    order = prompt_order(len(inputs.train), training.max_steps, config.prompts_per_step, training.seed)
    sampling = Sampling(config.max_new_tokens, config.temperature)
    ours = with_our_text(trainer_class, end_ids(policy, tokenizer), sampling, training.batch_size)
    trainer = without_printer(
        ours(
            model=policy,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=config_class(
                **training.arguments(work),
                num_generations=config.samples_per_prompt,
                max_completion_length=config.max_new_tokens,
                temperature=config.temperature,
                beta=config.beta,
                shuffle_dataset=False,  # `order` is the order: TRL's own would not survive a resume
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": [m.model_dump() for m in inputs.train[i].prompt]} for i in order]
            ),
            peft_config=training.peft_config(),
        )
    )
    use_plain_head(trainer, config.temperature)
    return trainer


def figures(metrics: Metrics, normalizer: RewardNormalizer, kept: int) -> dict[str, Any]:
    """Of the manifest, about the model that is kept. `kept_step`: the step whose weights these are, 0 where none was
    better than the start model. `score_mean` and `score_std`: the scale of the reward."""
    trained = [row for row in metrics.rows if row["reward"] is not None]
    last = [row for row in trained if row["step"] <= kept][-1:] or trained[:1]
    checks = [row for row in metrics.rows if row["pm_score"] is not None]
    its_check = next((row for row in checks if row["step"] == kept), checks[-1])
    flag = flagged(metrics)
    return {
        "steps": metrics.rows[-1]["step"],
        "kept_step": kept,
        "score_mean": normalizer.mean,
        "score_std": normalizer.std,
        "reward_before": trained[0]["reward"],
        **{name: last[0][name] for name in ("reward", "kl", "cut_off_share", "reply_tokens")},
        **{f"{name}_before": checks[0][name] for name in ("pm_score", "monitor_score")},
        **{name: its_check[name] for name in ("pm_score", "monitor_score")},
        "goodhart": flag["goodhart"] if flag else None,
        "goodhart_step": flag["step"] if flag else None,
    }


@dataclass(frozen=True)
class RlPrompts:
    """The prompts of a run, and what identifies the rows they come from."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    counts: Counts
    rows: dict[str, Any]


def read_rl_prompts(config: RlConfig, base: Path, judges: Sequence[Path]) -> RlPrompts:
    """Read, mix and split the prompts; those that do not fit a model are rejected.

    Args:
        config: The options of the stage.
        base: The policy's directory.
        judges: Directories of the preference models, whose windows count too.

    Raises:
        CaiError: A file cannot be read, or too few prompts fit.
    """
    reader, helpful_reader = config.row_reader(), config.row_reader()
    given = [prompt for _, prompt in reader.prompts(config.input, limit=config.limit)]
    helpful = [prompt for _, prompt in helpful_reader.prompts(config.helpful, "helpful")] if config.helpful else []
    counts = Counts.of_training([*reader.take_invalid(), *helpful_reader.take_invalid()])
    chosen = mixed(given, helpful, config.helpful_ratio, seed_for(config.seed, "rl", "helpful"))
    if left := len(given) + len(helpful) - len(chosen):
        counts.skipped["beyond --helpful-ratio"] = left
    if config.helpful and len(helpful) < round(config.helpful_ratio * len(given)):
        console.say(f"rl: {config.helpful} has {len(helpful):,} prompts, fewer than --helpful-ratio requests")
    fitting = fitting_prompts(chosen, base, judges, config.max_new_tokens, counts)
    train, held_out = hold_out(fitting, config.held_out, config.seed)
    counts.train, counts.held_out = len(train), len(held_out)
    return RlPrompts(train, held_out, counts, rows_digest([*given, *helpful]))


def estimate(rows: RowFlow, config: RlConfig) -> StepCost:
    """The cost of all replies, of scoring them, and of training on them."""
    trained = config.steps * config.replies
    checks = 1 + -(-config.steps // config.monitor_every)
    checked = max(16, min(config.held_out, rows.rows // 2))
    replies, new = trained + checks * checked, config.max_new_tokens
    whole = rows.prompt_tokens + new
    # Each reply is read by the preference model and by the start model too.
    read, requests = replies * (rows.prompt_tokens + 2 * whole), 0
    if config.monitor_pm:
        read += checks * checked * whole
    if config.monitor_judge:  # in both orders; the first check needs no judge, its replies are the start model's
        requests = 2 * (checks - 1) * checked
        examples = open_constitution(PreferenceConstitution, None, None).examples
        few_shot = sum(len(example.model_dump_json()) for example in examples) / CHARACTERS_PER_TOKEN
        read += requests * (few_shot + rows.prompt_tokens + 2 * new)
    return StepCost(rows.rows, replies + requests, TokenCounts(read, replies * new, trained * whole), rows)


def run(config: RlConfig) -> dict[str, Any]:
    """Train on a file of prompts. Returns the summary. Raises CaiError."""
    config.launch()
    training = config.training_config()
    models = {"model": ModelSource.resolve(config.model), "pm": ModelSource.resolve(config.pm)}
    base, pm = models["model"].path, models["pm"].path
    monitor_model = pick_monitor_model(
        config.monitor_pm, config.monitor_judge, config.base_url, models["pm"], device=training.device, seed=config.seed
    )
    inputs = {"prompts": hash_input(config.input)}
    if config.helpful:
        inputs["helpful"] = hash_input(config.helpful)
    judges = [pm, *([monitor_model.path] if monitor_model and monitor_model.path else [])]
    prompts = read_rl_prompts(config, base, judges)
    if config.report_to is Reporter.TENSORBOARD:  # OUT.partial, where transformers would log, goes away
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(sidecar(Path(config.output), "tensorboard")))
    given = RlInputs(base, pm, prompts.train, prompts.held_out, monitor_model)
    return TrainingJob(
        provenance=provenance(
            "rl",
            inputs=inputs,
            settings=training.settings(config),
            model={"fingerprint": models["model"].fingerprint},
            pm={"fingerprint": models["pm"].fingerprint},
            monitor=monitor_model.identity if monitor_model else None,
            rows=prompts.rows,
        ),
        inputs=inputs,
        models=models,
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=prompts.counts,
        train=lambda work: rl(given, config, training, work),
        facts=training.facts(
            "pass after pass over all prompts, each in a new random order", config.steps * config.replies
        ),
    ).run(as_json=config.as_json)


def _share(replies: int, batch_size: int | None) -> int:
    """How many of the replies of a step one process makes. Raises UsageError where they cannot be dealt out evenly."""
    parts = (batch_size or 1) * distributed.world_size()
    if replies % parts:
        given = [f"--batch-size {batch_size}"] if batch_size else []
        given += [f"{distributed.world_size()} processes"] if distributed.world_size() > 1 else []
        raise UsageError(
            f"{' times '.join(given)} does not divide the {replies} replies of a step",
            hint="--prompts-per-step times --samples-per-prompt",
        )
    return replies // distributed.world_size()


STAGE = Stage("rl", Phase.FEEDBACK, RlConfig, run, estimate, reads=(Prompt,), writes=None)
