"""Checks of the policy during `cai rl` and `cai dpo`: its replies to held-out prompts, every few steps (paper section
4.3).

The seed of a reply derives from the run's seed and the prompt, not from the step, so only the policy changes between
two checks. Replies and scores are stored in `samples.jsonl`. In `rl` the check before the first step also determines
how the reward is standardised. `dpo` has no preference model; there the score of a reply is its implicit reward, beta
times the logarithm of its probability under the policy over that under the start model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically
from cai_cli.common.seeds import seed_for
from cai_cli.data.jsonl import AppendFile, cut_torn_tail, read_rows, rows_of
from cai_cli.data.schema import PolicySample, Prompt, dump_row
from cai_cli.engines.base import GenerationRequest, RequestFailure, Sampling
from cai_cli.engines.local.model_in_training import engine_around
from cai_cli.engines.thoughts import separate
from cai_cli.engines.tokenization import PromptEncoder, encode_chat, encode_text
from cai_cli.metrics.reply_habits import opening
from cai_cli.models.adapters import is_adapted, without_adapter_wrapper
from cai_cli.phase2_feedback.goodhart import SHARES, Check, best_check, goodhart, mean_of
from cai_cli.phase2_feedback.monitor_models import MonitorScorer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer, replies_per_prompt, silent_judge
from cai_cli.phase2_feedback.rl_rewards import RewardSource, mean_rewards, reward_of
from cai_cli.prompting.base import assistant, reply_request
from cai_cli.training import distributed
from cai_cli.training.checkpoints import verify
from cai_cli.training.metrics_log import Metrics
from cai_cli.training.sharding import whole_weights

if TYPE_CHECKING:
    from torch import Tensor

REPLY_COLUMNS = (
    "monitor_score",
    "held_out_kl",
    "held_out_entropy",
    "held_out_reply_tokens",
    "held_out_cut_off_share",
    "distinct_openings",
    "evasive_share",
    "boilerplate_share",
    "goodhart",
)
IMPLICIT_COLUMNS = ("implicit_reward", *REPLY_COLUMNS)
# Token ids (1, length) and a number of last positions -> the logits there (1, positions, vocabulary).
Logits = Callable[["Tensor", int], "Tensor"]


def check_columns(sources: Sequence[RewardSource]) -> tuple[str, ...]:
    """The metrics of a check of `cai rl`, those of the parts of the reward first."""
    names = [source.name for source in sources]
    shares = ("held_out_no_reward_share",) if "judge" in names else ()
    return (*(f"{name}_score" for name in names), *shares, *REPLY_COLUMNS)


@dataclass
class Monitor:
    """The checks of one run, made on rank 0.

    Attributes:
        prompts: The held-out prompts.
        tokenizer: The policy's tokenizer.
        sources: The parts of the reward; empty where the reward is the implicit one of DPO.
        monitor_scorer: The monitor model, or None.
        file: Where the replies of all checks are written.
        sampling: How tokens are sampled.
        seed: Random seed of the run.
        batch_size: Replies that are sampled at once; None for the default of the local engine.
        total: Number of checks of the run, without the start model's.
        rows: The replies of all checks so far, in order.
        autocast: The context that gives policy and reference the precision of training, whatever wraps them.
        beta: The beta of the implicit reward.
        stage: The stage, for messages.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    sources: Sequence[RewardSource]
    monitor_scorer: MonitorScorer | None
    file: Path
    sampling: Sampling
    seed: int
    batch_size: int | None
    total: int
    rows: list[PolicySample] = field(default_factory=list)
    autocast: Callable[[], Any] = nullcontext
    beta: float = 1.0
    stage: str = "rl"

    def __post_init__(self) -> None:
        if distributed.is_rank_zero() and self.file.exists():
            cut_torn_tail(self.file)
            self.rows = [row for _, row in read_rows(str(self.file), rows_of(PolicySample))]

    @property
    def checks(self) -> list[Check]:
        """The replies of each check, in the order of steps."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.step)]

    @property
    def normalizers(self) -> dict[str, RewardNormalizer]:
        """The normalizers of the parts of the reward. They depend on the start model's replies alone, so a resume does
        not change them.

        Raises:
            CaiError: A preference model scores the replies to each prompt alike (`cannot-distinguish`).
        """
        starts = [row for row in self.rows if row.step == 0]
        return {source.name: source.normalizer(starts) for source in self.sources}

    def drop_after(self, step: int) -> None:
        """Drop the checks after `step`, because they are repeated."""
        if not distributed.is_rank_zero():
            return
        self.rows = [row for row in self.rows if row.step <= step]
        write_atomically(self.file, (dump_row(row) + b"\n" for row in self.rows))

    def check(self, step: int, policy: Any, reference: Logits) -> dict[str, float | str | None]:
        """Sample replies to the held-out prompts, store them, and measure them.

        Args:
            step: The step after which the policy is checked.
            policy: The policy.
            reference: The model that training started from.

        Returns:
            `pm_score` and `judge_score` are in the unit of the reward, `implicit_reward` is in nats, `held_out_kl` and
            `held_out_entropy` are in nats per token, `goodhart` is the reason of a flag or None.

        Raises:
            CaiError: A prompt cannot be answered, or the preference model cannot tell the start model's replies apart.
        """
        self.drop_after(step - 1)
        with self.autocast():
            replies = self._replies(policy)
            was_training = policy.training
            policy.eval()
            kl, entropy, log_ratios = self._divergence(policy, reference, replies)
        policy.train(was_training)
        rows = self._scored(step, replies, log_ratios)
        file = AppendFile(self.file)
        file.append(rows)
        file.close()
        self.rows += rows
        normalizers = self.normalizers
        name = " + ".join(f"{source.name}_score" for source in self.sources) or "implicit_reward"

        def measure(row: PolicySample) -> float | None:
            return reward_of(row, self.sources, normalizers) if self.sources else row.score

        return {
            **(mean_rewards(rows, self.sources, normalizers) or {"implicit_reward": mean_of(rows, measure)}),
            "monitor_score": mean_of(rows, lambda row: row.monitor_score),
            "held_out_kl": kl,
            "held_out_entropy": entropy,
            "held_out_reply_tokens": fmean(row.reply_tokens for row in rows),
            "held_out_cut_off_share": mean_of(rows, SHARES["cut_off_share"]),
            "distinct_openings": len({opening(row.reply) for row in rows}) / len(rows),
            "evasive_share": mean_of(rows, SHARES["evasive_share"]),
            "boilerplate_share": mean_of(rows, SHARES["boilerplate_share"]),
            "goodhart": goodhart(self.checks, self.total, reward=name, measure=measure),
        }

    def _replies(self, policy: Any) -> list[tuple[Prompt, int, Any]]:
        """(prompt, sample index, reply with its thoughts), those to the same prompt in succession."""
        each = replies_per_prompt(len(self.prompts)) if self.sources else 1  # the normalizers need more
        requested = [(prompt, index) for prompt in self.prompts for index in range(each)]
        requests = [
            GenerationRequest(reply_request(prompt.prompt, "chat").text, seed_for(self.seed, "check", prompt.id, index))
            for prompt, index in requested
        ]
        with engine_around(
            without_adapter_wrapper(policy), self.tokenizer, self.batch_size, sharded=distributed.weights_are_sharded()
        ) as engine:
            replies = engine.generate_whole(requests, self.sampling)
        if failure := next((reply for reply in replies if isinstance(reply, RequestFailure)), None):
            raise CaiError(f"{self.stage}: no reply to a held-out prompt: {failure.reason}", code="request-failed")
        return [(prompt, index, reply) for (prompt, index), reply in zip(requested, replies, strict=True)]

    def _scored(
        self, step: int, replies: Sequence[tuple[Prompt, int, Any]], log_ratios: Sequence[float]
    ) -> list[PolicySample]:
        opened = PromptEncoder(self.tokenizer).opened
        separated = [separate(reply.text, opened) for _, _, reply in replies]
        prompts, texts = [prompt for prompt, _, _ in replies], [text or "" for _, text in separated]
        start_replies = [row.reply for row in self.rows if row.step == 0] or texts
        monitor_scores = (
            self.monitor_scorer(prompts, texts, start_replies) if self.monitor_scorer else [None] * len(texts)
        )
        if self.monitor_scorer and (missing := monitor_scores.count(None)):
            console.warn(
                f"{self.stage}: step {step:,}: the monitor gave no score to {missing:,} of {len(texts):,} replies"
            )
        scores = {source.name: source.check(prompts, texts, start_replies) for source in self.sources}
        if not self.sources:
            scores["pm"] = [self.beta * ratio for ratio in log_ratios]
        none = [None] * len(texts)
        return [
            PolicySample(
                **{name: getattr(prompt, name) for name in Prompt.model_fields},  # without a rubric
                sample_index=index,
                completion=[assistant(text or "")],
                thoughts=thoughts,
                finish_reason=reply.finish_reason,
                step=step,
                reply_tokens=reply.new_tokens,
                score=score,
                judge_score=judge_score,
                monitor_score=monitor_score,
            )
            for (prompt, index, reply), (thoughts, text), score, judge_score, monitor_score in zip(
                replies, separated, scores.get("pm", none), scores.get("judge", none), monitor_scores, strict=True
            )
        ]

    def _divergence(
        self, policy: Any, reference: Logits, replies: Sequence[tuple[Prompt, int, Any]]
    ) -> tuple[float, float, list[float]]:
        """KL divergence from the reference, and entropy, in nats per token; and the log-ratio of each reply in nats.

        The first two are means over the positions where a token was sampled, each over the whole vocabulary. The reply
        is encoded from its text, as for the preference model; its end of turn is not part of the log-ratio.
        """
        import torch

        kl = entropy = tokens = 0.0
        log_ratios = []
        for asked, _, answer in replies:
            prompt = encode_chat(self.tokenizer, asked.prompt, add_generation_prompt=True)
            reply = encode_text(self.tokenizer, answer.text, start=False)
            sampled = len(reply) + (answer.finish_reason == "stop")
            ids = torch.tensor([prompt + reply], device=policy.device)
            with torch.inference_mode():
                p, q = (
                    (logits(ids, len(reply) + 1)[0, :sampled].float() / self.sampling.temperature).log_softmax(-1)
                    for logits in (logits_of(policy), reference)
                )
                kl += float((p.exp() * (p - q)).sum())
                entropy -= float((p.exp() * p).sum())
                # A reply of no tokens has an empty slice, whose sum is 0.
                chosen = ids[0, len(prompt) :, None]
                log_ratios.append(float((p - q)[: len(reply)].gather(1, chosen).sum()))
            tokens += sampled
        return kl / max(tokens, 1), entropy / max(tokens, 1), log_ratios


def logits_of(model: Any) -> Logits:
    """A causal language model as a function from token ids to logits."""

    def logits(ids: "Tensor", keep: int) -> "Tensor":
        output: Tensor = model(input_ids=ids, logits_to_keep=keep).logits
        return output

    return logits


def reference_of(trainer: Any, base: Path, dtype: str = "float32") -> Logits:
    """The model that training started from.

    It is the policy without its adapters, or TRL's reference model, which is loaded here where beta is 0 and TRL has
    none.

    Args:
        trainer: The trainer of the policy.
        base: Directory of the model that training started from.
        dtype: The precision in which it is loaded here, by its name in torch.
    """
    from cai_cli.models.loading import load_causal_lm

    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not is_adapted(policy):
        if trainer.ref_model is not None:
            return logits_of(trainer.accelerator.unwrap_model(trainer.ref_model))
        checks_here = distributed.is_rank_zero()
        return logits_of(load_causal_lm(base, dtype, trainer.args.device.type) if checks_here else None)

    def without_adapters(ids: "Tensor", keep: int) -> "Tensor":
        with policy.disable_adapter():
            return logits_of(policy)(ids, keep)

    return without_adapters


@dataclass
class PolicyChecks:
    """Checks the policy every few steps, and stops training at a flagged check where that is requested.

    Attributes:
        monitor: Makes the checks, on rank 0.
        trainer: The trainer of the policy.
        metrics: Receives the metrics of each check.
        reference: The model that training started from.
        every: Steps between checks; the last step is checked too.
        stop: Whether a flagged check ends training and the best policy before it is kept.
        kept: The step whose weights the trainer has after such a stop, 0 for the start model; None without a stop.
    """

    monitor: Monitor
    trainer: Any
    metrics: Metrics
    reference: Logits
    every: int
    stop: bool
    _normalizers: dict[str, RewardNormalizer] = field(default_factory=dict)
    kept: int | None = None

    def callback(self) -> Any:
        """The callback to add to the trainer."""
        from transformers import TrainerCallback

        checks = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                checks.begin(state)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % checks.every == 0 or state.global_step >= state.max_steps:
                    checks.check(args, state, control)

        return Callback()

    def begin(self, state: Any) -> None:
        """Drop the checks that a resumed run repeats, or check the start model and log the metrics."""
        self.monitor.drop_after(state.global_step)
        if not self.metrics.at(0):
            self.metrics.put(0, self._check(0)[0])
        if self.monitor.sources:
            self._normalizers = distributed.from_rank_zero(lambda: self.monitor.normalizers)
        if warning := silent_judge(self._normalizers):
            console.warn(warning)
        if state.global_step == 0 and distributed.is_rank_zero():
            self._log(self.metrics.rows[0])

    @property
    def normalizers(self) -> dict[str, RewardNormalizer]:
        """The normalizers of the parts of the reward, on every rank. They are known when training has begun."""
        return self._normalizers

    def check(self, args: Any, state: Any, control: Any) -> None:
        """Check the policy after this step, log the metrics, and warn at the first flagged check."""
        step, flagged_before = state.global_step, flagged(self.metrics)
        metrics, best = self._check(step)
        self.metrics.put(step, metrics)
        if distributed.is_rank_zero():
            self._log(metrics)
        if metrics["goodhart"] and not flagged_before:
            console.warn(
                f"{self.monitor.stage}: step {step:,}: {metrics['goodhart']}" + (" (stopping)" if self.stop else "")
            )
        if self.stop:
            self._keep_best(best, args, state, control, flag=bool(metrics["goodhart"]))

    def _check(self, step: int) -> tuple[dict[str, float | str | None], int]:
        """The metrics of a check, and the step whose weights are the best so far."""
        with whole_weights(self.trainer, reference=True) as policy:
            return distributed.from_rank_zero(lambda: self._check_with(policy, step))

    def _check_with(self, policy: Any, step: int) -> tuple[dict[str, float | str | None], int]:
        metrics = self.monitor.check(step, policy, self.reference)
        checks = self.monitor.checks
        return metrics, checks[best_check(checks[:-1] if metrics["goodhart"] else checks)][0].step

    def _keep_best(self, best: int, args: Any, state: Any, control: Any, *, flag: bool) -> None:
        """Save a checkpoint of the best policy so far; at a flagged check stop training and load that checkpoint."""
        if best:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{best}")
        if flag:
            if best:
                distributed.from_rank_zero(lambda: verify(Path(state.best_model_checkpoint)))
            self.kept = best
            control.should_training_stop, control.should_save = True, False
            args.load_best_model_at_end = best > 0
        elif best == state.global_step:
            control.should_save = True

    def _log(self, metrics: Mapping[str, float | str | None]) -> None:
        """Log to the tools of `--report-to`. With its own control, because logging resets that of the step."""
        from transformers import TrainerControl

        present = {name: value for name, value in metrics.items() if value is not None and name != "step"}
        self.trainer.callback_handler.on_log(self.trainer.args, self.trainer.state, TrainerControl(), present)


def flagged(metrics: Metrics) -> dict[str, Any] | None:
    """The metrics of the first flagged check, or None."""
    return next((row for row in metrics.rows if row["goodhart"]), None)
