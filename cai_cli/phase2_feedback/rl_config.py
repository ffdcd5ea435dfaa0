"""The options of `cai rl`."""

from enum import StrEnum
from importlib.util import find_spec
from typing import Any, ClassVar

from cai_cli.common.errors import UsageError
from cai_cli.models.loading import pick_device
from cai_cli.phase2_feedback import rl_rollouts
from cai_cli.phase2_feedback.rl_judge import JUDGE_SETTINGS, JudgeRewardOptions, refuse_judge_as_monitor
from cai_cli.phase2_feedback.rl_rollouts import Rollouts
from cai_cli.reward.scorer import PreferenceModelOptions, Scorer, check_device
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.shared_options import (
    DEFAULT_MODEL,
    MODEL_TO_TRAIN_HELP,
    EngineOptions,
    SamplingOptions,
    named_values,
)
from cai_cli.training import distributed
from cai_cli.training.config import TrainingConfig
from cai_cli.training.memory import Workload
from cai_cli.training.options import DefaultRates, TrainerOptions

VLLM_SHARE = 0.3  # of the GPU's memory, TRL's default


class Algorithm(StrEnum):
    """The policy-gradient algorithm."""

    RLOO = "rloo"
    GRPO = "grpo"


class ScaleRewards(StrEnum):
    """What GRPO divides a reply's advantage by."""

    NONE = "none"
    GROUP = "group"
    BATCH = "batch"


class RlConfig(TrainerOptions, PreferenceModelOptions, JudgeRewardOptions):
    """Train a policy by RL against a preference model, a constitution with a judge (--judge), or both.

    INPUT: prompts in any format that `cai sample` takes. Writes a model directory.
    """

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    pm: str | None = option(  # type: ignore[assignment]
        None,
        "Preference model of the reward, from `cai train-pm`; with --pm-url also server:NAME, a model that only the "
        "server has. --judge may take its place.",
        Option(Effect.HASHED, Group.MODEL),
    )
    pm_device: str = option(
        "auto",
        "Device of the preference model: cpu, cuda or cuda:N; auto is the device of training.",
        Option(Effect.HARMLESS, Group.MODEL, metavar="DEVICE"),
    )
    helpful: str | None = option(
        None,
        "File of helpful prompts to mix in, in any format that INPUT takes.",
        Option(Effect.HASHED, reads_file=True),
    )
    helpful_ratio: float = option(1.0, "Helpful prompts for each prompt of INPUT.", ge=0.0)
    algorithm: Algorithm = option(
        Algorithm.RLOO,
        "rloo (leave-one-out baseline, beta * KL in the reward, as in the paper) or grpo (beta * KL in the loss).",
    )
    scale_rewards: ScaleRewards = option(
        ScaleRewards.NONE,
        "With --algorithm grpo: divide each reply's advantage by the standard deviation of the rewards of its prompt "
        "(group) or of the step (batch), or not at all (none). group and batch take the unit away from --beta, and "
        "group gives near-ties the weight of clear preferences.",
    )
    beta: float = option(
        0.05,
        "Weight of the KL divergence from --model, in units of the reward per nat. The unit is the standard deviation "
        "of the scores of --model's replies to the same prompt, over two or more replies to each held-out prompt.",
        ge=0.0,
    )
    steps: int = option(100, "Training steps.", ge=1)
    prompts_per_step: int = option(4, "Prompts in each step.", ge=1)
    samples_per_prompt: int = option(4, "Replies to each prompt of a step; each is compared with the others.", ge=2)
    batch_size: int | None = option(
        None,
        "Replies in one forward pass of one process; by default its whole share of a step.",
        Option(Effect.HARMLESS, Group.TRAINING),
        ge=1,
    )
    rollouts: Rollouts = option(
        Rollouts.AUTO,
        "Engine that samples the replies to train on: local (that of `cai sample`), vllm (on the GPUs of the policy) "
        "or vllm-server. auto is vllm on CUDA where it is installed and knows the model, else local.",
        Option(group=Group.SAMPLING),
    )
    rollout_batch_size: int | None = option(
        None,
        "Replies that local rollouts and checks sample at once in one process; by default fitted to the device.",
        Option(Effect.HARMLESS, Group.SAMPLING),
        ge=1,
    )
    rollout_url: str | None = option(
        None,
        "Address of the `vllm serve` that samples the replies, as http://HOST:PORT.",
        Option(Effect.HARMLESS, Group.SAMPLING),
    )
    engine_arg: list[str] | None = redefine(
        EngineOptions,
        "engine_arg",
        None,
        "Setting of vLLM's rollouts, such as gpu_memory_utilization=0.4; can be repeated.",
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 128)
    temperature: float = option(1.0, "Sampling temperature.", Option(group=Group.SAMPLING), ge=0.01)
    cutoff_penalty: float = option(
        1.0, "Subtracted from the standardised score of a reply that is cut off at --max-new-tokens.", ge=0.0
    )
    default_rates: ClassVar[DefaultRates] = DefaultRates(full=1e-6, lora=2e-5)
    learning_rate: float | None = redefine(TrainerOptions, "learning_rate", None, default_rates.help)
    held_out: int = option(
        32, "Prompts held out to check the policy, with two replies or more to each; at most half of all prompts.", ge=1
    )
    monitor_every: int = option(10, "Steps between checks of the policy on the held-out prompts.", ge=1)
    monitor_pm: str | None = option(
        None,
        "A second preference model, not used as the reward, that scores the replies of the checks.",
        Option(Effect.HASHED, aliases=("watch-pm",)),
    )
    monitor_judge: str | None = option(
        None,
        "A judge, not used as the reward, that compares the replies of the checks with those of --model: by their "
        "helpfulness where the prompt's kind is helpful, else under the shipped principles.",
        Option(Effect.HASHED, aliases=("watch-judge",)),
    )
    base_url: list[str] | None = redefine(EngineOptions, "base_url", None)
    stop_on_goodhart: bool = option(
        False,
        "Stop training at a flagged check, and keep the best policy before it.",
        Option(flags=("--stop-on-goodhart",)),
    )
    save_steps: int = redefine(TrainerOptions, "save_steps", 25)

    @property
    def replies(self) -> int:
        """Replies in one step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def checks(self) -> int:
        """Checks of the policy, without that of the start model."""
        return -(-self.steps // self.monitor_every)

    @property
    def trainer_beta(self) -> float:
        """`beta` as TRL's trainer takes it, so that it weighs the KL divergence alike under both algorithms.

        GRPO compares a reply with the mean of all n replies to its prompt, itself included. This multiplies the
        gradient of the reward by (n - 1) / n, but not the gradient of the KL divergence in the loss.
        """
        if self.algorithm is Algorithm.RLOO or self.scale_rewards is not ScaleRewards.NONE:
            return self.beta
        return self.beta * (self.samples_per_prompt - 1) / self.samples_per_prompt

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The options that decide the output. Those that the algorithm does not use are left out."""
        settings = super().settings(**resolved)
        unused = ["scale_rewards"] if self.algorithm is Algorithm.RLOO else []
        unused += [] if self.judge else JUDGE_SETTINGS
        unused += [] if self.pm else ["pm_dtype"]
        unused += [] if self.judge and self.pm else ["judge_weight"]
        return {name: value for name, value in settings.items() if name not in unused}

    def check(self) -> None:
        super().check()
        check_device(self.pm_device)
        if not self.pm and not self.judge:
            raise UsageError(
                "the reward is missing: a preference model or a judge",
                hint="--pm MODEL, or --judge MODEL with a constitution",
                code="missing-option",
            )
        if self.pm_url and not self.pm:
            raise UsageError("--pm-url is the address of --pm, and there is none", code="option-conflict")
        if self.judge_weight != 1 and not (self.pm and self.judge):
            raise UsageError("--judge-weight is for --judge and --pm together", code="option-conflict")
        refuse_judge_as_monitor(self.judge, self.monitor_judge)
        if self.pm_url and self.pm_device != "auto":
            raise UsageError("--pm-url excludes --pm-device: the model runs on the server", code="option-conflict")
        if self.algorithm is Algorithm.RLOO and self.scale_rewards is not ScaleRewards.NONE:
            raise UsageError(
                f"--scale-rewards {self.scale_rewards} is an option of --algorithm grpo", code="option-conflict"
            )
        rl_rollouts.check_options(
            self.rollouts, self.rollout_batch_size, self.rollout_url, named_values(self.engine_arg)
        )

    def reward_scorer(self, training: TrainingConfig) -> Scorer | None:
        """The preference model of the reward, or None. Raises UsageError, CaiError."""
        if not self.pm:
            return None
        return self.open_scorer(training.batch_size, training.device if self.pm_device == "auto" else self.pm_device)

    @property
    def scorers(self) -> list[str]:
        """The names of the preference models and of the judge of the reward on the device that trains."""
        judges = [self.local_judge] if self.local_judge else []
        if self.pm_url or self.pm_device not in ("auto", "cuda"):
            return judges
        return [name for name in (self.pm, self.monitor_pm) if name] + judges

    def workload(self, length: int, scorer_parameters: int = 0) -> Workload:
        """What training does with its model, as far as memory depends on it.

        Args:
            length: Most tokens of a prompt and its reply.
            scorer_parameters: Parameters of `scorers` together.
        """
        share = self.replies // distributed.world_size()
        engine = named_values(self.engine_arg)
        by_vllm = self.rollouts is Rollouts.VLLM or (self.rollouts is Rollouts.AUTO and find_spec("vllm") is not None)
        return Workload(
            length,
            scored=self.max_new_tokens,
            replies=min(share, self.rollout_batch_size or share),
            reference=True,  # the checks need it also at beta 0
            scorer_parameters=scorer_parameters,
            scorer_dtype=self.pm_dtype.value,
            engine_share=engine.get("gpu_memory_utilization", VLLM_SHARE) if by_vllm else 0.0,
            engine_gpus=engine.get("tensor_parallel_size", 1),
        )

    def training_config(self) -> TrainingConfig:
        """These options as a trainer takes them.

        Raises:
            UsageError: The replies of a step cannot be divided evenly.
            CaiError: There is no such device.
        """
        share = _share(self.replies, self.batch_size)
        device = pick_device(self.device)
        return TrainingConfig(
            batch_size=self.batch_size or share,
            gradient_accumulation=share // (self.batch_size or share),
            learning_rate=self.peak_learning_rate,
            save_steps=self.save_steps,
            seed=self.seed,
            device=device,
            lora_rank=self.lora_rank if self.lora else None,
            keep_adapter=self.keep_adapter,
            max_steps=self.steps,
            schedule="constant",
            report_to=self.report_to,
            **self.memory_options(device),
        )


def _share(replies: int, batch_size: int | None) -> int:
    """The number of replies of a step that one process samples.

    Raises:
        UsageError: The replies cannot be divided evenly among processes and batches.
    """
    parts = (batch_size or 1) * distributed.world_size()
    if replies % parts:
        given = [f"--batch-size {batch_size}"] if batch_size else []
        given += [f"{distributed.world_size()} processes"] if distributed.world_size() > 1 else []
        raise UsageError(
            f"{' times '.join(given)} does not divide the {replies} replies of a step",
            hint="a step has --prompts-per-step times --samples-per-prompt replies",
            code="option-conflict",
        )
    return replies // distributed.world_size()
