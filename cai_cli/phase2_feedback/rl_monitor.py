"""Checks of the policy during `cai rl`: its replies to held-out prompts, every few steps (paper section 4.3).

The seed of a reply derives from the run's seed and the prompt, not from the step, so only the policy changes between
two checks. Replies and scores are stored in `samples.jsonl`. The check before the first step also determines how the
reward is standardised.
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
from cai_cli.engines.local.engine import engine_around
from cai_cli.engines.tokenization import encode_chat, encode_text
from cai_cli.metrics.reply_habits import opening
from cai_cli.models.adapters import without_adapter_wrapper
from cai_cli.phase2_feedback.goodhart import SHARES, Check, best_check, goodhart, mean_of
from cai_cli.phase2_feedback.monitor_models import MonitorScorer, ReplyScorer
from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer, replies_per_prompt, reward_normalizer
from cai_cli.prompting.base import assistant, reply_request
from cai_cli.training import distributed
from cai_cli.training.checkpoints import verify
from cai_cli.training.metrics_log import Metrics

if TYPE_CHECKING:
    from torch import Tensor

CHECK_COLUMNS = (
    "pm_score",
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
# Token ids (1, length) and a number of last positions -> the logits there (1, positions, vocabulary).
Logits = Callable[["Tensor", int], "Tensor"]


@dataclass
class Monitor:
    """The checks of one run, made on rank 0.

    Attributes:
        prompts: The held-out prompts.
        tokenizer: The policy's tokenizer.
        score: The preference model of the reward.
        monitor_scorer: The monitor model, or None.
        file: Where the replies of all checks are written.
        sampling: How tokens are sampled.
        seed: Random seed of the run.
        batch_size: Replies that are sampled at once.
        total: Number of checks of the run, without the start model's.
        rows: The replies of all checks so far, in order.
        autocast: The context that gives policy and reference the precision of training, whatever wraps them.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    score: ReplyScorer
    monitor_scorer: MonitorScorer | None
    file: Path
    sampling: Sampling
    seed: int
    batch_size: int
    total: int
    rows: list[PolicySample] = field(default_factory=list)
    autocast: Callable[[], Any] = nullcontext

    def __post_init__(self) -> None:
        if distributed.is_rank_zero() and self.file.exists():
            cut_torn_tail(self.file)
            self.rows = [row for _, row in read_rows(str(self.file), rows_of(PolicySample))]

    @property
    def checks(self) -> list[Check]:
        """The replies of each check, in the order of steps."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.step)]

    @property
    def normalizer(self) -> RewardNormalizer:
        """The normalizer of the reward. It depends on the start model's replies alone, so a resume does not change it.

        Raises:
            CaiError: The replies to each prompt have the same score (`cannot-distinguish`).
        """
        return reward_normalizer([row for row in self.rows if row.step == 0])

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
            The metrics named in `CHECK_COLUMNS`. `pm_score` is in the unit of the reward, `held_out_kl` and
            `held_out_entropy` are in nats per token, `goodhart` is the reason of a flag or None.

        Raises:
            CaiError: A prompt cannot be answered, or the preference model cannot tell the start model's replies apart.
        """
        self.drop_after(step - 1)
        was_training = policy.training
        policy.eval()
        with self.autocast():
            replies = self._replies(policy)
        rows = self._scored(step, replies)
        with self.autocast():
            kl, entropy = self._divergence(policy, reference, rows)
        policy.train(was_training)
        file = AppendFile(self.file)
        file.append(rows)
        file.close()
        self.rows += rows
        return {
            "pm_score": self.normalizer(fmean(row.score for row in rows)),
            "monitor_score": mean_of(rows, lambda row: row.monitor_score),
            "held_out_kl": kl,
            "held_out_entropy": entropy,
            "held_out_reply_tokens": fmean(row.reply_tokens for row in rows),
            "held_out_cut_off_share": mean_of(rows, SHARES["cut_off_share"]),
            "distinct_openings": len({opening(row.reply) for row in rows}) / len(rows),
            "evasive_share": mean_of(rows, SHARES["evasive_share"]),
            "boilerplate_share": mean_of(rows, SHARES["boilerplate_share"]),
            "goodhart": goodhart(self.checks, self.total),
        }

    def _replies(self, policy: Any) -> list[tuple[Prompt, int, Any]]:
        """(prompt, sample index, reply), those to the same prompt in succession."""
        each = replies_per_prompt(len(self.prompts))
        requested = [(prompt, index) for prompt in self.prompts for index in range(each)]
        requests = [
            GenerationRequest(reply_request(prompt.prompt, "chat").text, seed_for(self.seed, "check", prompt.id, index))
            for prompt, index in requested
        ]
        replies = engine_around(without_adapter_wrapper(policy), self.tokenizer, self.batch_size).generate(
            requests, self.sampling
        )
        if failure := next((reply for reply in replies if isinstance(reply, RequestFailure)), None):
            raise CaiError(f"rl: no reply to a held-out prompt: {failure.reason}", code="request-failed")
        return [(prompt, index, reply) for (prompt, index), reply in zip(requested, replies, strict=True)]

    def _scored(self, step: int, replies: Sequence[tuple[Prompt, int, Any]]) -> list[PolicySample]:
        prompts, texts = [prompt for prompt, _, _ in replies], [reply.text for _, _, reply in replies]
        start_replies = [row.reply for row in self.rows if row.step == 0] or texts
        monitor_scores = (
            self.monitor_scorer(prompts, texts, start_replies) if self.monitor_scorer else [None] * len(texts)
        )
        if self.monitor_scorer and (missing := monitor_scores.count(None)):
            console.warn(f"rl: step {step:,}: the monitor gave no score to {missing:,} of {len(texts):,} replies")
        return [
            PolicySample(
                **dict(prompt),
                sample_index=index,
                completion=[assistant(reply.text)],
                finish_reason=reply.finish_reason,
                step=step,
                reply_tokens=reply.new_tokens,
                score=score,
                monitor_score=monitor_score,
            )
            for (prompt, index, reply), score, monitor_score in zip(
                replies, self.score(prompts, texts), monitor_scores, strict=True
            )
        ]

    def _divergence(self, policy: Any, reference: Logits, rows: Sequence[PolicySample]) -> tuple[float, float]:
        """KL divergence from the reference, and entropy, in nats per token.

        Both are means over the positions where a token was sampled, each over the whole vocabulary. The reply is
        encoded from its text, as for the preference model.
        """
        import torch

        kl = entropy = tokens = 0.0
        for row in rows:
            prompt = encode_chat(self.tokenizer, row.prompt, add_generation_prompt=True)
            reply = encode_text(self.tokenizer, row.reply, start=False)
            sampled = len(reply) + (row.finish_reason == "stop")
            ids = torch.tensor([prompt + reply], device=policy.device)
            with torch.inference_mode():
                p, q = (
                    (logits(ids, len(reply) + 1)[0, :sampled].float() / self.sampling.temperature).log_softmax(-1)
                    for logits in (logits_of(policy), reference)
                )
                kl += float((p.exp() * (p - q)).sum())
                entropy -= float((p.exp() * p).sum())
            tokens += sampled
        return kl / max(tokens, 1), entropy / max(tokens, 1)


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
    from accelerate.utils import is_peft_model

    from cai_cli.models.loading import load_causal_lm

    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(policy):
        return logits_of(trainer.ref_model or load_causal_lm(base, dtype, trainer.args.device.type))

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
        """Drop the checks that a resumed run repeats, or log the check of the start model."""
        self.monitor.drop_after(state.global_step)
        if state.global_step == 0 and distributed.is_rank_zero():
            self._log({name: self.metrics.rows[0][name] for name in CHECK_COLUMNS})

    def check(self, args: Any, state: Any, control: Any) -> None:
        """Check the policy after this step, log the metrics, and warn at the first flagged check."""
        step, flagged_before = state.global_step, flagged(self.metrics)
        metrics, best = distributed.from_rank_zero(lambda: self._check(step))
        self.metrics.put(step, metrics)
        if distributed.is_rank_zero():
            self._log(metrics)
        if metrics["goodhart"] and not flagged_before:
            console.warn(f"rl: step {step:,}: {metrics['goodhart']}" + (" (stopping)" if self.stop else ""))
        if self.stop:
            self._keep_best(best, args, state, control, flag=bool(metrics["goodhart"]))

    def _check(self, step: int) -> tuple[dict[str, float | str | None], int]:
        """The metrics of a check, and the step whose weights are the best so far."""
        metrics = self.monitor.check(step, self.trainer.accelerator.unwrap_model(self.trainer.model), self.reference)
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
