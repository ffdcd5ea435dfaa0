"""`cai rl`: train a policy by RL against a preference model (paper sections 4.1 and 4.2, the RL-CAI model), or against
a constitution with a judge (`--judge`, see `rl_judge`).

The objective is the paper's: the preference model's score of the reply minus beta times the KL divergence from the
start model, on red-team prompts mixed with helpful ones. Departures: the paper uses PPO with a critic, which TRL no
longer has. RLOO (the default) subtracts beta * KL from the score as PPO does, and its baseline is the mean score of the
other replies to the prompt instead of a critic; `--algorithm grpo` puts the KL into the loss. `--cutoff-penalty` is
subtracted for a reply cut off at the length limit: the chat template closes every reply, so the preference model cannot
detect the cut. The paper's lambda_KL is 0.001 per nat of the raw score (in the work whose settings it takes over, Bai
et al. 2022, arXiv 2204.05862), so small that it hardly acts; `--beta` is 0.05 per nat by default, because a small
preference model is sooner exploited.

Scores are standardised: the start model's replies to the held-out prompts have mean 0, and standard deviation 1 within
a prompt (both constants are in the manifest). So beta, in standard deviations per nat, and the penalty mean the same
for every preference model, even one whose labels were clamped to 40-60% and whose margins are at most ln 1.5 = 0.405.

Replies are sampled as in `cai sample`, not by TRL: with the same seed a run has the same prompts, replies and rewards
on one process and on several, up to rounding. On CUDA vLLM may sample them instead (`rl_rollouts`), without that
promise.

Every `--monitor-every` steps the policy answers the held-out prompts: `rl_monitor` documents what is measured,
`goodhart` when a check is flagged.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.library_errors import library_failures
from cai_cli.data.schema import Prompt
from cai_cli.engines.base import Sampling
from cai_cli.engines.choice import this_machine
from cai_cli.engines.tokenization import declare_end_of_turn, end_of_turn_ids
from cai_cli.judging.answer_cache import AnswerCache
from cai_cli.judging.constitution_judge import ConstitutionJudge
from cai_cli.models.source import ModelSource
from cai_cli.phase2_feedback.goodhart import weak_alarm
from cai_cli.phase2_feedback.monitor_models import (
    MonitorModel,
    ReplyScorer,
    judged_tokens,
    pick_monitor_model,
    preference_score,
)
from cai_cli.phase2_feedback.reward_normalizer import replies_per_prompt
from cai_cli.phase2_feedback.rl_config import Algorithm, RlConfig
from cai_cli.phase2_feedback.rl_judge import judge_file, refuse_same_model
from cai_cli.phase2_feedback.rl_metrics import manifest_metrics, step_columns
from cai_cli.phase2_feedback.rl_monitor import Monitor, PolicyChecks, check_columns, reference_of
from cai_cli.phase2_feedback.rl_prompts import RlPrompts, longest_prompt, prompt_order, read_rl_prompts
from cai_cli.phase2_feedback.rl_rewards import (
    RewardFunction,
    RewardSource,
    judge_source,
    preference_source,
    with_early_rewards,
)
from cai_cli.phase2_feedback.rl_rollouts import Rollouts, pick_rollouts, rollout_facts, trl_arguments
from cai_cli.phase2_feedback.rl_trainer import with_seeded_sampling, with_vllm_sampling
from cai_cli.reward.scorer import Scorer
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import named_values
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training import distributed, sharding
from cai_cli.training.activations import shape_of_dir
from cai_cli.training.checkpoints import save_finished, save_start_model
from cai_cli.training.config import TrainingConfig
from cai_cli.training.cpu_logprobs import use_unfused_head
from cai_cli.training.loop import fit, without_printer
from cai_cli.training.memory import Workload
from cai_cli.training.memory_check import check_memory
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.training_run import TrainingJob


@dataclass(frozen=True)
class RlInputs:
    """The models and prompts of a run.

    Attributes:
        base: Directory of the start model, which is the reference model too.
        preference_model: The preference model of the reward, or None.
        train: The prompts to train on.
        held_out: The prompts to check the policy on.
        monitor_model: The monitor model, or None.
        rollouts: The engine that samples the replies to train on; not `auto`.
        judge: The judge of the reward, or None.
    """

    base: Path
    preference_model: Scorer | None
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    monitor_model: MonitorModel | None
    rollouts: Rollouts = Rollouts.LOCAL
    judge: ConstitutionJudge | None = None


def rl(inputs: RlInputs, config: RlConfig, training: TrainingConfig, work: Path) -> dict[str, Any]:
    """Train the policy against a preference model (paper sections 4.1 and 4.2), a judge, or both.

    Args:
        inputs: Models and prompts. The reference model is loaded from `inputs.base` too, which must hold exactly the
            weights that training starts from.
        config: The options of the stage.
        training: The options of the trainer.
        work: A directory; the trained model is written to `work/model`.

    Returns:
        The metrics of the manifest.

    Raises:
        CaiError: The preference model cannot tell the start model's replies apart, or training fails; see `fit`.
    """
    policy, tokenizer = _load_policy(inputs.base, training, work)
    ends = declare_end_of_turn(policy, tokenizer)  # TRL reads the config
    score = preference_score(inputs.preference_model) if inputs.preference_model else None
    sources = _reward_sources(score, inputs.judge, config.judge_weight)
    if inputs.judge and distributed.is_rank_zero():
        inputs.judge.cache = AnswerCache(judge_file(work))
    columns = step_columns(sources)
    metrics = Metrics(work / "metrics.jsonl", [*columns, *check_columns(sources)])
    monitor = _open_monitor(inputs, config, training, tokenizer, sources, work)
    checks: PolicyChecks
    reward = RewardFunction(
        sources,
        lambda: checks.normalizers,  # which are known when training begins
        tokenizer,
        ends,
        config.cutoff_penalty,
        score,
        inputs.judge,
        inputs.train,
    )
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        for part in (reward, inputs.preference_model):
            if part:
                stack.enter_context(closing(part))
        trainer = _policy_trainer(inputs, config, training, work, policy, tokenizer, reward)
        reference = reference_of(trainer, inputs.base, training.frozen_dtype)
        checks = PolicyChecks(
            monitor, trainer, metrics, reference, every=config.monitor_every, stop=config.stop_on_goodhart
        )
        trainer.add_callback(checks.callback())
        throughput = fit(trainer, metrics, columns, name="rl")
    kept = checks.kept if checks.kept is not None else int(trainer.state.global_step)
    if kept:
        save_finished(trainer, tokenizer, work / "model", keep_adapter=training.keep_adapter)
    else:
        save_start_model(inputs.base, tokenizer, work / "model", keep_adapter=training.keep_adapter)
    _copy_beside_model(work)
    answers = {"judge_answers": len(inputs.judge.cache)} if inputs.judge else {}
    return {**manifest_metrics(metrics, checks.normalizers, kept), **answers, "throughput": throughput}


def _load_policy(base: Path, training: TrainingConfig, work: Path) -> tuple[Any, Any]:
    """The model to train, and its tokenizer."""
    from cai_cli.models.loading import load_causal_lm, load_tokenizer

    with sharding.announced(training.arguments(work)):
        policy, tokenizer = load_causal_lm(base, **training.loading), load_tokenizer(base)
    if policy.config._name_or_path != str(base):
        raise AssertionError("TRL would load the reference model from another directory")
    return policy, tokenizer


def _copy_beside_model(work: Path) -> None:
    """Copy the replies of the checks and the judge's answers into the directory of the trained model."""
    if distributed.is_rank_zero():
        for file in (work / "samples.jsonl", judge_file(work)):
            if file.exists():
                shutil.copyfile(file, work / "model" / file.name)


def _reward_sources(
    score: ReplyScorer | None, judge: ConstitutionJudge | None, judge_weight: float
) -> list[RewardSource]:
    """The parts of the reward. A judge without a preference model beside it has weight 1."""
    sources = [preference_source(score)] if score else []
    if judge:
        sources.append(judge_source(judge, judge_weight if score else 1.0))
    return sources


def _open_monitor(
    inputs: RlInputs,
    config: RlConfig,
    training: TrainingConfig,
    tokenizer: Any,
    sources: Sequence[RewardSource],
    work: Path,
) -> Monitor:
    monitor_model = inputs.monitor_model
    if monitor_model and (warning := weak_alarm(len(inputs.held_out), config.checks)):
        console.warn(f"rl: {warning}")
    return Monitor(
        inputs.held_out,
        tokenizer,
        sources,
        monitor_model.open() if monitor_model and distributed.is_rank_zero() else None,
        work / "samples.jsonl",
        Sampling(config.max_new_tokens, config.temperature),
        training.seed,
        config.rollout_batch_size,
        config.checks,
        autocast=training.autocast,
    )


def _policy_trainer(
    inputs: RlInputs, config: RlConfig, training: TrainingConfig, work: Path, policy: Any, tokenizer: Any, reward: Any
) -> Any:
    """TRL's trainer, with replies sampled as `inputs.rollouts` says and prompts in the order of `prompt_order`."""
    from datasets import Dataset

    assert training.max_steps  # noqa: S101
    order = prompt_order(len(inputs.train), training.max_steps, config.prompts_per_step, training.seed)
    trainer_class, args = _trainer_class_and_args(inputs, config, training, work, policy, tokenizer)
    if inputs.judge:
        trainer_class = with_early_rewards(trainer_class, reward.start)
    with library_failures(), distributed.same_environment():
        trainer = trainer_class(
            model=policy,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list(
                [{"prompt": [m.model_dump() for m in inputs.train[i].prompt]} for i in order]
            ),
            peft_config=training.peft_config(policy),
        )
    use_unfused_head(trainer, config.temperature)
    return without_printer(trainer)


def _trainer_class_and_args(
    inputs: RlInputs, config: RlConfig, training: TrainingConfig, work: Path, policy: Any, tokenizer: Any
) -> tuple[Any, Any]:
    """The class of the trainer and its TRL config."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config_class = {
        Algorithm.RLOO: (RLOOTrainer, RLOOConfig),
        Algorithm.GRPO: (GRPOTrainer, GRPOConfig),
    }[config.algorithm]
    options: dict[str, Any] = {"model_init_kwargs": training.reference_options}
    if config.algorithm is Algorithm.GRPO:
        options["scale_rewards"] = config.scale_rewards.value
    args = config_class(
        **training.arguments(work),
        num_generations=config.samples_per_prompt,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.trainer_beta,
        **options,
        shuffle_dataset=False,  # TRL's own order would not survive a resume
        **trl_arguments(
            inputs.rollouts,
            end_of_turn_ids(tokenizer, policy.generation_config),
            longest_prompt(inputs.train, tokenizer) + config.max_new_tokens,
            config.rollout_url,
            named_values(config.engine_arg),
        ),
    )
    if inputs.rollouts is not Rollouts.LOCAL:
        return with_vllm_sampling(trainer_class), args
    sampling = Sampling(config.max_new_tokens, config.temperature)
    return with_seeded_sampling(trainer_class, sampling, config.rollout_batch_size), args


def estimate(rows: RowFlow, config: RlConfig) -> StepCost:
    """The cost of all replies, of scoring them, and of training on them. A prompt with a rubric counts as one that the
    constitution judges. Rank 0 makes the checks and asks the judge."""
    trained = config.steps * config.replies
    checks = 1 + config.checks
    held_out = max(1, min(config.held_out, rows.rows // 2))
    checked = held_out * replies_per_prompt(held_out)
    replies, new = trained + checks * checked, config.max_new_tokens
    whole = rows.prompt_tokens + new
    # The preference model and the start model read each reply too.
    readers = 1 + bool(config.pm)
    each_read = rows.prompt_tokens + readers * whole
    divided, read, requests = trained * each_read, checks * checked * each_read, 0
    tokens, each = (rows.prompt_tokens, new), replies_per_prompt(held_out)
    for prompts, sampled, later in (
        (config.steps * config.prompts_per_step, config.samples_per_prompt, False),
        (held_out, each, False),
        ((checks - 1) * held_out, each, True),
    ):
        asked, judged = config.judge_cost(prompts, sampled, tokens, with_start=later)
        requests, read = requests + asked, read + judged
    if config.monitor_pm:
        read += checks * checked * whole
    if config.monitor_judge:  # both orders; the first check needs no judge, because its replies are the start model's
        compared = 2 * (checks - 1) * checked
        requests += compared
        read += compared * judged_tokens(rows.prompt_tokens, new)
    counts = TokenCounts(divided + read, replies * new, trained * whole)
    return StepCost(rows.rows, replies + requests, counts, rows, alone=TokenCounts(read, checks * checked * new))


def _workload(config: RlConfig, rollouts: Rollouts, base: Path, prompts: RlPrompts) -> Workload:
    """What training does with the policy, as far as memory depends on it; `rollouts` are those of this machine."""
    from cai_cli.models.loading import load_tokenizer

    length = longest_prompt([*prompts.train, *prompts.held_out], load_tokenizer(base)) + config.max_new_tokens
    scorers = [shape_of_dir(ModelSource.resolve(name).path).scorer for name in config.scorers]
    return config.model_copy(update={"rollouts": rollouts}).workload(length, sum(scorers))


def run(config: RlConfig) -> dict[str, Any]:
    """Train on a file of prompts. Returns the summary. Raises UsageError, CaiError."""
    config.launch()
    training = config.training_config()
    pm = config.reward_scorer(training)
    policy = ModelSource.resolve(config.model, config.chat_template)
    judge = config.open_judge(config.seed)
    models = {"model": policy} | ({"pm": pm.source} if pm and pm.source else {})
    if config.local_judge:
        models["judge"] = ModelSource.resolve(config.local_judge)
    base = policy.path
    monitor_model = pick_monitor_model(
        config.monitor_pm,
        config.monitor_judge,
        config.base_url,
        pm.source if pm else None,
        device=pm.device if pm else training.device,
        dtype=config.pm_dtype.value,
        seed=config.seed,
    )
    refuse_same_model(judge, monitor_model)
    inputs = {"prompts": hash_input(config.input)}
    if config.helpful:
        inputs["helpful"] = hash_input(config.helpful)
    preference_models = [path for path in (pm and pm.path, monitor_model and monitor_model.path) if path]
    prompts = read_rl_prompts(config, base, preference_models)
    rollouts = pick_rollouts(config.rollouts, base, this_machine(training.device))
    rl_inputs = RlInputs(base, pm, prompts.train, prompts.held_out, monitor_model, rollouts, judge)
    return TrainingJob(
        provenance=provenance(
            "rl",
            inputs=inputs,
            settings=training.settings(
                config, pm_dtype=pm and pm.dtype, reference_weights=training.frozen_dtype, rollouts=rollouts.value
            ),
            model=policy.identity(),
            pm=pm and pm.identity(),
            judge=config.judge_identity(judge),
            monitor=monitor_model.identity if monitor_model else None,
            rows=prompts.rows,
        ),
        inputs=inputs,
        models=models,
        output=Path(config.output),
        overwrite=config.overwrite,
        counts=prompts.counts,
        train=lambda work: rl(rl_inputs, config, training, work),
        facts=training.facts(
            "pass after pass over all prompts, each in a new random order", config.steps * config.replies
        )
        | rollout_facts(rollouts),
        check=lambda: check_memory("rl", base, training, _workload(config, rollouts, base, prompts)),
    ).run(as_json=config.as_json)


STAGE = Stage("rl", Phase.FEEDBACK, RlConfig, run, estimate, reads=(Prompt,), writes=None)
