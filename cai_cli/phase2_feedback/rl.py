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
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Prompt
from cai_cli.data.splits import mixed
from cai_cli.engines.base import Sampling
from cai_cli.models.loading import pick_device
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.monitor_models import MonitorModel, pick_monitor_model, preference_score
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
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import sidecar
from cai_cli.training import distributed
from cai_cli.training.checkpoints import save_finished, save_model
from cai_cli.training.config import LearningRate, Lora, LoraRank, SaveSteps, TrainingConfig
from cai_cli.training.cpu_logprobs import use_plain_head
from cai_cli.training.launcher import AccelerateConfig, NumProcesses, as_asked
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import Counts, TrainingJob, rows_digest

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
ALGORITHMS = ("rloo", "grpo")
REPORTERS = ("tensorboard", "trackio")


def rl(
    base: Path,
    preference_model: Path,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    training: TrainingConfig,
    work: Path,
    *,
    algorithm: str,
    beta: float,
    prompts_per_step: int,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    cutoff_penalty: float,
    monitor_model: MonitorModel | None,
    monitor_every: int,
    stop_on_goodhart: bool,
) -> dict[str, Any]:
    """Train the policy in `base`; the finished one is left in `work/model`. Returns the figures.

    The reference model is loaded from `base` as well, which must hold exactly the weights training starts from.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from cai_cli.models.loading import load_causal_lm, load_tokenizer

    assert training.max_steps  # noqa: S101
    if distributed.weights_are_sharded():
        raise UsageError(
            "rl needs the whole policy in every process, to sample from it and to check it",
            hint="--accelerate-config multi_gpu, zero1 or zero2; --lora takes less memory",
        )
    policy, tokenizer = load_causal_lm(base, "float32", training.device), load_tokenizer(base)
    if policy.config._name_or_path != str(base):
        raise AssertionError("the reference model would be loaded from elsewhere")
    score = preference_score(preference_model, training.device, training.batch_size)
    metrics = Metrics(work / "metrics.jsonl", [*COLUMNS, *CHECK_COLUMNS])
    monitor = Monitor(
        held_out,
        tokenizer,
        score,
        monitor_model.open() if monitor_model and distributed.leads() else None,
        work / "samples.jsonl",
        Sampling(max_new_tokens, temperature),
        training.seed,
        training.batch_size,
    )
    if not metrics.at(0):
        metrics.put(0, distributed.from_leader(lambda: monitor.check(0, policy, logits_of(policy))))
    normalizer = distributed.from_leader(lambda: monitor.normalizer)
    ends = end_ids(policy, tokenizer)
    trainer_class, config_class = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[algorithm]
    order = prompt_order(len(prompts), training.max_steps, prompts_per_step, training.seed)
    with quiet_libraries():
        trainer = without_printer(
            with_our_text(trainer_class, ends, monitor.sampling, training.batch_size)(
                model=policy,
                processing_class=tokenizer,
                reward_funcs=preference_reward(score, normalizer, ends, cutoff_penalty),
                args=config_class(
                    **training.arguments(work),
                    num_generations=samples_per_prompt,
                    max_completion_length=max_new_tokens,
                    temperature=temperature,
                    beta=beta,
                    shuffle_dataset=False,  # `order` is the order: TRL's own would not survive a resume
                ),
                train_dataset=Dataset.from_list(
                    [{"prompt": [m.model_dump() for m in prompts[i].prompt]} for i in order]
                ),
                peft_config=training.peft_config(),
            )
        )
        use_plain_head(trainer, temperature)
        checks = checks_callback(
            monitor, trainer, metrics, reference_of(trainer, base), every=monitor_every, stop=stop_on_goodhart
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
        **{f"{name}_before": checks[0][name] for name in ("pm_score", "watch_score")},
        **{name: its_check[name] for name in ("pm_score", "watch_score")},
        "goodhart": flag["goodhart"] if flag else None,
        "goodhart_step": flag["step"] if flag else None,
    }


def command(
    input: options.Input,
    output: options.ModelOutput,
    pm: options.PreferenceModel,
    model: options.Model = options.DEFAULT_MODEL,
    helpful: Annotated[
        str | None, typer.Option(help="Helpful prompts, in any form that INPUT may have, mixed in.")
    ] = None,
    helpful_ratio: Annotated[float, typer.Option(min=0.0, help="Helpful prompts per prompt of INPUT.")] = 1.0,
    algorithm: Annotated[str, typer.Option(help="rloo (beta * KL in the reward, as the paper) or grpo.")] = "rloo",
    beta: Annotated[
        float,
        typer.Option(
            min=0.0, help="Weight of the KL divergence from --model: standard deviations of the score per nat."
        ),
    ] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 100,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Prompts in one step.")] = 4,
    samples_per_prompt: Annotated[int, typer.Option(min=2, help="Replies to each of them, compared in a group.")] = 4,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Replies in one forward pass of one process; by default all of its share of a step."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    cutoff_penalty: Annotated[
        float, typer.Option(min=0.0, help="Taken from the standardised score of a reply cut at the limit.")
    ] = 1.0,
    learning_rate: LearningRate = 1e-6,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    held_out: Annotated[
        int, typer.Option(min=1, help="Prompts never trained on, by which the policy is checked; at most half.")
    ] = 32,
    monitor_every: Annotated[int, typer.Option(min=1, help="Steps between checks on the held-out prompts.")] = 10,
    monitor_pm: Annotated[
        str | None,
        typer.Option("--monitor-pm", "--watch-pm", help="A second preference model, which scores the checks only."),
    ] = None,
    monitor_judge: Annotated[
        str | None,
        typer.Option(
            "--monitor-judge",
            "--watch-judge",
            help="A judge that compares the replies of the checks with those of --model.",
        ),
    ] = None,
    base_url: options.BaseUrl = None,
    stop_on_goodhart: Annotated[
        bool, typer.Option("--stop-on-goodhart", help="Stop at a flagged check and keep the best policy before it.")
    ] = False,
    report_to: Annotated[str | None, typer.Option(help="tensorboard or trackio, beside metrics.jsonl.")] = None,
    save_steps: SaveSteps = 25,
    accelerate_config: AccelerateConfig = None,
    num_processes: NumProcesses = None,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    skip_invalid: options.SkipInvalid = False,
    max_invalid: options.MaxInvalid = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a policy by reinforcement learning against a preference model.

    INPUT: prompts in any form that `cai sample` takes. Writes a model directory.
    """
    flags = locals()
    as_asked(accelerate_config, num_processes)
    replies = prompts_per_step * samples_per_prompt
    share = _share(replies, batch_size)
    _check(algorithm, report_to)
    models = {"model": ModelSource.resolve(model), "pm": ModelSource.resolve(pm)}
    where = pick_device(device)
    monitor_model = pick_monitor_model(monitor_pm, monitor_judge, base_url, models["pm"], device=where, seed=seed)
    inputs = {"prompts": hash_input(input)} | ({"helpful": hash_input(helpful)} if helpful else {})
    reader, helpful_reader = RowReader.of(flags), RowReader.of(flags)
    given = [prompt for _, prompt in reader.prompts(input, limit=limit)]
    helpful_prompts = [prompt for _, prompt in helpful_reader.prompts(helpful, "helpful")] if helpful else []
    counts = Counts(rejected=[*reader.take_invalid(), *helpful_reader.take_invalid()])
    chosen = mixed(given, helpful_prompts, helpful_ratio, seed_for(seed, "rl", "helpful"))
    if left := len(given) + len(helpful_prompts) - len(chosen):
        counts.skipped["beyond --helpful-ratio"] = left
    if helpful and len(helpful_prompts) < round(helpful_ratio * len(given)):
        console.say(f"rl: {helpful} holds {len(helpful_prompts):,} prompts, fewer than --helpful-ratio asks for")
    judges = [models["pm"].path, *([monitor_model.path] if monitor_model and monitor_model.path else [])]
    fitting = fitting_prompts(chosen, models["model"].path, judges, max_new_tokens, counts)
    train, checked = hold_out(fitting, held_out, seed)
    counts.train, counts.held_out = len(train), len(checked)
    training = TrainingConfig(
        batch_size=batch_size or share,
        gradient_accumulation=share // (batch_size or share),
        learning_rate=learning_rate,
        save_steps=save_steps,
        seed=seed,
        device=where,
        lora_rank=lora_rank if lora else None,
        max_steps=steps,
        schedule="constant",
        report_to=report_to,
    )
    if report_to == "tensorboard":  # OUT.partial, where transformers would put them, goes away
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(sidecar(output, "tensorboard")))
    TrainingJob(
        provenance=provenance(
            "rl",
            inputs=inputs,
            settings=training.settings(flags),
            model={"fingerprint": models["model"].fingerprint},
            pm={"fingerprint": models["pm"].fingerprint},
            monitor=monitor_model.identity if monitor_model else None,
            rows=rows_digest([*given, *helpful_prompts]),
        ),
        inputs=inputs,
        models=models,
        output=output,
        overwrite=overwrite,
        counts=counts,
        train=lambda work: rl(
            models["model"].path,
            models["pm"].path,
            train,
            checked,
            training,
            work,
            algorithm=algorithm,
            beta=beta,
            prompts_per_step=prompts_per_step,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            cutoff_penalty=cutoff_penalty,
            monitor_model=monitor_model,
            monitor_every=monitor_every,
            stop_on_goodhart=stop_on_goodhart,
        ),
        facts=training.facts("pass after pass over all prompts, each in a new random order", steps * replies),
    ).run(as_json=json)


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


def _check(algorithm: str, report_to: str | None) -> None:
    if algorithm not in ALGORITHMS:
        raise UsageError(f"--algorithm must be rloo or grpo, not {algorithm!r}")
    if report_to not in (None, *REPORTERS):
        raise UsageError(f"--report-to must be {' or '.join(REPORTERS)}, not {report_to!r}")
    if report_to and find_spec(report_to) is None:
        raise UsageError(f"--report-to {report_to}: not installed", hint=f"pip install {report_to}")
