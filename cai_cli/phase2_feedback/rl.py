"""`cai rl`: train a policy against a preference model (paper section 4.1 and 4.2, the RL-CAI model).

The objective is the paper's: the preference model's score of the reply less beta times the KL divergence from the
model RL starts from. Departures: the paper uses PPO with a critic, which TRL no longer has. RLOO (the default)
subtracts beta * KL from the score as PPO does and takes the mean score of the other replies to the prompt where PPO
has the critic; `--algorithm grpo` puts the KL into the loss. A reply cut at the length limit loses
`--cutoff-penalty`: the preference model sees every reply closed by the chat template and could not tell.

beta is in units of the score per nat. Labels clamped to 40-60% teach margins of at most ln 1.5 = 0.405, so a small
beta is a strong pull there.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_cli import console, options
from cai_cli.cpu_head import use_plain_head
from cai_cli.engines.base import seed_for
from cai_cli.engines.chat import encode_chat
from cai_cli.errors import RowError, UsageError
from cai_cli.intake import Intake
from cai_cli.manifest import hash_input, provenance, settings_of
from cai_cli.phase2_feedback.preference_model import encode_conversation, score_conversations
from cai_cli.prompts import assistant
from cai_cli.records import Message, Prompt, conversation_id, reject
from cai_cli.training import (
    LearningRate,
    Lora,
    LoraRank,
    Metrics,
    Recipe,
    SaveSteps,
    finished_model,
    fit,
    pick_device,
    quiet_libraries,
    save_model,
    tokenizer_and_window,
    without_printer,
)
from cai_cli.training_job import Base, Counts, TrainingJob, rows_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "pm_score",
    "reward_std": "pm_score_std",
    "shaped_reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "reply_tokens": "completions/mean_length",
    "cut_off_share": "cut_off_share",
}
ALGORITHMS = ("rloo", "grpo")
Chat = list[dict[str, str]]


def prompt_order(count: int, steps: int, per_step: int, seed: int) -> list[int]:
    """Indices of the prompts of every step, one after the other: pass after pass over all, each in a new order."""
    rng = random.Random(seed_for(seed, "rl", "order"))  # noqa: S311
    order: list[int] = []
    while len(order) < steps * per_step:
        order += rng.sample(range(count), count)
    return order[: steps * per_step]


def fitting_prompts(
    prompts: Sequence[Prompt], policy: Path, preference_model: Path, max_new_tokens: int, counts: Counts
) -> list[Prompt]:
    """The prompts that both models can take with a reply of `max_new_tokens`; the others are rejected into `counts`,
    a repeated one is skipped."""
    fitting, seen = [], set()
    (tokenizer, window), (judge_tokenizer, judge_window) = map(tokenizer_and_window, (policy, preference_model))
    for prompt in prompts:
        try:
            asked = len(encode_chat(tokenizer, prompt.prompt, add_generation_prompt=True))
            judged = len(encode_conversation(judge_tokenizer, [*prompt.prompt, assistant("")]))
        except RowError as error:
            counts.rejected.append(reject(prompt.key, error.message, prompt))
            continue
        same = conversation_id(prompt.prompt)
        if asked + max_new_tokens > window or judged + max_new_tokens > judge_window:
            reason = "prompt and --max-new-tokens do not fit the context window"
            counts.rejected.append(reject(prompt.key, reason, prompt))
        elif same in seen:
            counts.skipped["same prompt as an earlier line"] += 1
        else:
            seen.add(same)
            fitting.append(prompt)
    return fitting


def messages_of(chat: Chat) -> list[Message]:
    return [Message.model_validate(message) for message in chat]


def preference_reward(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ends: frozenset[int],
    cutoff_penalty: float,
    batch_size: int,
) -> Callable[..., list[float]]:
    """The reward of TRL's trainers: the score of prompt and reply, less the penalty where the reply does not end
    with one of the token ids `ends`."""
    from statistics import fmean, pstdev

    def reward(
        prompts: list[Chat],
        completions: list[Chat],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        conversations = [messages_of(p + c) for p, c in zip(prompts, completions, strict=True)]
        scores = score_conversations(model, tokenizer, conversations, batch_size)
        cut = [ids[-1] not in ends for ids in completion_ids]
        log_metric("pm_score", fmean(scores))
        log_metric("pm_score_std", pstdev(scores))
        log_metric("cut_off_share", fmean(cut))
        return [score - cutoff_penalty * was_cut for score, was_cut in zip(scores, cut, strict=True)]

    return reward


def safe_prompts(trainer_class: Any) -> Any:
    """The trainer class with our encoding of prompts, in which no text of a row becomes a control token."""

    class SafePrompts(trainer_class):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[Chat]) -> tuple[list[list[int]], None, dict[str, Any]]:
            encoded = [
                encode_chat(self._tokenizer, messages_of(prompt), add_generation_prompt=True) for prompt in prompts
            ]
            return encoded, None, {}

    return SafePrompts


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The token ids that end a reply: the tokenizer's and those of the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))


def rl(
    base: Path,
    preference_model: Path,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    work: Path,
    *,
    algorithm: str,
    beta: float,
    prompts_per_step: int,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    cutoff_penalty: float,
) -> dict[str, Any]:
    """Train the policy in `base`; the finished one is left in `work/model`. Returns the figures.

    The reference model is loaded from `base` as well, which must hold exactly the weights training starts from.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from cai_cli.models import load_causal_lm, load_reward_model, load_tokenizer

    assert recipe.max_steps  # noqa: S101
    policy, tokenizer = load_causal_lm(base, "float32", recipe.device), load_tokenizer(base)
    judge = load_reward_model(preference_model, "float32", recipe.device)
    judge_tokenizer = load_tokenizer(preference_model)
    if policy.config._name_or_path != str(base):
        raise AssertionError("the reference model would be loaded from elsewhere")
    trainer_class, config_class = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[algorithm]
    order = prompt_order(len(prompts), recipe.max_steps, prompts_per_step, recipe.seed)
    metrics = Metrics(work / "metrics.jsonl", list(COLUMNS))
    with quiet_libraries():
        trainer = without_printer(
            safe_prompts(trainer_class)(
                model=policy,
                processing_class=tokenizer,
                reward_funcs=preference_reward(
                    judge, judge_tokenizer, end_ids(policy, tokenizer), cutoff_penalty, recipe.batch_size
                ),
                args=config_class(
                    **recipe.arguments(work),
                    num_generations=samples_per_prompt,
                    max_completion_length=max_new_tokens,
                    temperature=temperature,
                    beta=beta,
                    shuffle_dataset=False,  # `order` is the order: TRL's own would not survive a resume
                ),
                train_dataset=Dataset.from_list(
                    [{"prompt": [m.model_dump() for m in prompts[i].prompt]} for i in order]
                ),
                peft_config=recipe.peft_config(),
            )
        )
        use_plain_head(trainer, temperature)
        fit(trainer, metrics, COLUMNS, name="rl")
    save_model(finished_model(trainer), tokenizer, work / "model")
    first, last = metrics.rows[0], metrics.rows[-1]
    return {
        "steps": int(trainer.state.global_step),
        "reward_before": first["reward"],
        "reward": last["reward"],
        "kl": last["kl"],
        "cut_off_share": last["cut_off_share"],
        "reply_tokens": last["reply_tokens"],
    }


def command(
    input: options.Input,
    output: options.ModelOutput,
    pm: options.PreferenceModel,
    model: options.Model = options.DEFAULT_MODEL,
    algorithm: Annotated[str, typer.Option(help="rloo (beta * KL in the reward, as the paper) or grpo.")] = "rloo",
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the KL divergence from --model.")] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 100,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Prompts in one step.")] = 4,
    samples_per_prompt: Annotated[int, typer.Option(min=2, help="Replies to each of them, compared in a group.")] = 4,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Replies in one forward pass; by default all of a step.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    cutoff_penalty: Annotated[
        float, typer.Option(min=0.0, help="Taken from the score of a reply cut at --max-new-tokens.")
    ] = 1.0,
    learning_rate: LearningRate = 1e-6,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    save_steps: SaveSteps = 25,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    skip_bad: options.SkipBad = False,
    max_bad: options.MaxBad = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a policy by reinforcement learning against a preference model.

    INPUT: prompts in any form that `cai sample` takes. Writes a model directory.
    """
    flags = locals()
    console.set_quiet(quiet)
    if algorithm not in ALGORITHMS:
        raise UsageError(f"--algorithm must be rloo or grpo, not {algorithm!r}")
    replies = prompts_per_step * samples_per_prompt
    if batch_size and (batch_size > replies or replies % batch_size):
        raise UsageError(
            f"--batch-size {batch_size} does not divide the {replies} replies of a step",
            hint="--prompts-per-step times --samples-per-prompt",
        )
    models = {"model": Base.resolve(model), "pm": Base.resolve(pm)}
    inputs = {"prompts": hash_input(input)}
    intake = Intake.of(flags)
    given = [prompt for _, prompt in intake.prompts(input, limit=limit)]
    counts = Counts(rejected=intake.take_bad())
    prompts = fitting_prompts(given, models["model"].path, models["pm"].path, max_new_tokens, counts)
    counts.train = len(prompts)
    where = pick_device(device)
    recipe = Recipe(
        batch_size=batch_size or replies,
        gradient_accumulation=replies // (batch_size or replies),
        learning_rate=learning_rate,
        save_steps=save_steps,
        seed=seed,
        device=where,
        lora_rank=lora_rank if lora else None,
        max_steps=steps,
        schedule="constant",
    )
    settings = settings_of(flags, batch_size=recipe.batch_size, precision="float32" if where == "cpu" else "bfloat16")
    del settings["save_steps"]
    TrainingJob(
        provenance=provenance(
            "rl",
            inputs=inputs,
            settings=settings,
            model={"fingerprint": models["model"].fingerprint},
            pm={"fingerprint": models["pm"].fingerprint},
            rows=rows_digest(given),
        ),
        inputs=inputs,
        models=models,
        output=output,
        overwrite=overwrite,
        counts=counts,
        train=lambda work: rl(
            models["model"].path,
            models["pm"].path,
            prompts,
            recipe,
            work,
            algorithm=algorithm,
            beta=beta,
            prompts_per_step=prompts_per_step,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            cutoff_penalty=cutoff_penalty,
        ),
    ).run(as_json=json)
