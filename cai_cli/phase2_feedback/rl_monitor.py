"""What `cai rl` watches: the policy's replies to held-out prompts, every few steps (paper section 4.3).

The noise of a reply comes from (seed, prompt) and not from the step: what changes between two checks is the policy.
Replies and scores are kept in `samples.jsonl`; the check before the first step also sets the unit of the reward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
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
from cai_cli.phase2_feedback.monitor_models import MonitorScore, Score
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
LEAST_REPLIES = 16  # of a check: with fewer prompts held out, each is answered more than once
# Token ids (1, length) and how many last positions are wanted -> their logits (1, positions, vocabulary).
Logits = Callable[["Tensor", int], "Tensor"]


@dataclass(frozen=True)
class RewardNormalizer:
    """The unit of the reward: the start model's held-out replies have mean 0 and standard deviation 1 in it."""

    mean: float
    std: float

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std


@dataclass
class Monitor:
    """Checks of one run, made by rank 0. `score` is the preference model of the reward; `file` holds the replies of all
    checks."""

    prompts: Sequence[Prompt]
    tokenizer: Any
    score: Score
    monitor_score_of: MonitorScore | None
    file: Path
    sampling: Sampling
    seed: int
    batch_size: int
    rows: list[PolicySample] = field(default_factory=list)

    def __post_init__(self) -> None:
        if distributed.leads() and self.file.exists():
            cut_torn_tail(self.file)
            self.rows = [row for _, row in read_rows(str(self.file), rows_of(PolicySample))]

    @property
    def checks(self) -> list[Check]:
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.step)]

    @property
    def normalizer(self) -> RewardNormalizer:
        """Of the start model's replies, so the same after a resume. Raises CaiError when their scores do not differ."""
        scores = [row.score for row in self.rows if row.step == 0]
        if not (spread := stdev(scores)):
            raise CaiError(
                f"rl: the preference model gives the start model's {len(scores)} held-out replies one score, "
                f"{scores[0]:.4g}: it cannot tell them apart",
                hint="more --held-out prompts, or a preference model trained longer",
            )
        return RewardNormalizer(fmean(scores), spread)

    def forget(self, step: int) -> None:
        """Drop the checks after `step`: they are done again."""
        if not distributed.leads():
            return
        self.rows = [row for row in self.rows if row.step <= step]
        write_atomically(self.file, (dump_row(row) + b"\n" for row in self.rows))

    def check(self, step: int, policy: Any, reference: Logits) -> dict[str, float | str | None]:
        """Ask the policy, keep its replies, and return the figures of `CHECK_COLUMNS`."""
        self.forget(step - 1)
        was_training = policy.training
        policy.eval()
        rows = self._scored(step, self._replies(policy))
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
            "goodhart": goodhart(self.checks),
        }

    def _replies(self, policy: Any) -> list[tuple[Prompt, int, Any]]:
        """(prompt, sample index, reply) of every prompt, at least `LEAST_REPLIES` in all."""
        each = max(1, -(-LEAST_REPLIES // len(self.prompts)))
        wanted = [(prompt, index) for prompt in self.prompts for index in range(each)]
        asks = [
            GenerationRequest(reply_request(prompt.prompt, "chat").text, seed_for(self.seed, "check", prompt.id, index))
            for prompt, index in wanted
        ]
        replies = engine_around(without_adapter_wrapper(policy), self.tokenizer, self.batch_size).generate(
            asks, self.sampling
        )
        if refusal := next((reply for reply in replies if isinstance(reply, RequestFailure)), None):
            raise CaiError(f"rl: no reply to a held-out prompt: {refusal.reason}")
        return [(prompt, index, reply) for (prompt, index), reply in zip(wanted, replies, strict=True)]

    def _scored(self, step: int, replies: Sequence[tuple[Prompt, int, Any]]) -> list[PolicySample]:
        prompts, texts = [prompt for prompt, _, _ in replies], [reply.text for _, _, reply in replies]
        starts = [row.reply for row in self.rows if row.step == 0] or texts
        watched = self.monitor_score_of(prompts, texts, starts) if self.monitor_score_of else [None] * len(texts)
        if self.monitor_score_of and (silent := watched.count(None)):
            console.warn(f"rl: step {step:,}: the monitor model gave no score to {silent:,} of {len(texts):,} replies")
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
                replies, self.score(prompts, texts), watched, strict=True
            )
        ]

    def _divergence(self, policy: Any, reference: Logits, rows: Sequence[PolicySample]) -> tuple[float, float]:
        """KL divergence from the reference and entropy, each in nats per token, over the whole distribution at every
        place where a token was drawn; the reply is read as text, as the preference model reads it."""
        import torch

        kl = entropy = tokens = 0.0
        for row in rows:
            prompt = encode_chat(self.tokenizer, row.prompt, add_generation_prompt=True)
            reply = encode_text(self.tokenizer, row.reply, start=False)
            drawn = len(reply) + (row.finish_reason == "stop")
            ids = torch.tensor([prompt + reply], device=policy.device)
            with torch.inference_mode():
                p, q = (
                    (logits(ids, len(reply) + 1)[0, :drawn].float() / self.sampling.temperature).log_softmax(-1)
                    for logits in (logits_of(policy), reference)
                )
                kl += float((p.exp() * (p - q)).sum())
                entropy -= float((p.exp() * p).sum())
            tokens += drawn
        return kl / max(tokens, 1), entropy / max(tokens, 1)


def logits_of(model: Any) -> Logits:
    def logits(ids: "Tensor", keep: int) -> "Tensor":
        found: Tensor = model(input_ids=ids, logits_to_keep=keep).logits
        return found

    return logits


def reference_of(trainer: Any, base: Path) -> Logits:
    """The model that training started from: the policy without its adapters, or TRL's reference model (which it does
    not load where beta is 0)."""
    from accelerate.utils import is_peft_model

    from cai_cli.models.loading import load_causal_lm

    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(policy):
        return logits_of(trainer.ref_model or load_causal_lm(base, "float32", trainer.args.device.type))

    def without_adapters(ids: "Tensor", keep: int) -> "Tensor":
        with policy.disable_adapter():
            return logits_of(policy)(ids, keep)

    return without_adapters


def checks_callback(
    monitor: Monitor, trainer: Any, metrics: Metrics, reference: Logits, *, every: int, stop: bool
) -> Any:
    """A trainer callback that checks the policy every `every` steps and after the last. With `stop` a flagged check
    ends the training, and the best checkpoint so far becomes the trainer's model again."""
    from transformers import TrainerCallback, TrainerControl

    def show(figures: Mapping[str, float | str | None]) -> None:
        """To whom `--report-to` names. Its own control: logging takes back what the step's has asked for."""
        shown = {name: value for name, value in figures.items() if value is not None and name != "step"}
        trainer.callback_handler.on_log(trainer.args, trainer.state, TrainerControl(), shown)

    def checked(step: int) -> tuple[dict[str, float | str | None], int]:
        """The figures of a check, and the step whose weights are to be kept when training ends here."""
        figures = monitor.check(step, trainer.accelerator.unwrap_model(trainer.model), reference)
        checks = monitor.checks
        return figures, checks[best_check(checks[:-1] if figures["goodhart"] else checks)][0].step

    class Checks(TrainerCallback):  # type: ignore[misc]
        kept: int | None = None  # the step whose weights were taken back, 0 for the start model's

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            monitor.forget(state.global_step)
            if state.global_step == 0 and distributed.leads():
                show({name: metrics.rows[0][name] for name in CHECK_COLUMNS})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, last = state.global_step, state.global_step >= state.max_steps
            if step % every and not last:
                return
            known = flagged(metrics)
            figures, kept = distributed.from_leader(lambda: checked(step))
            metrics.put(step, figures)
            if distributed.leads():
                show(figures)
            if figures["goodhart"] and not known:
                console.warn(f"rl: step {step:,}: {figures['goodhart']}" + (" (stopping)" if stop else ""))
            if not stop:
                return
            if kept:
                state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{kept}")
            if figures["goodhart"]:
                if kept:
                    distributed.from_leader(lambda: verify(Path(state.best_model_checkpoint)))
                self.kept = kept
                control.should_training_stop, control.should_save = True, False
                args.load_best_model_at_end = kept > 0
            elif kept == step:
                control.should_save = True

    return Checks()


def flagged(metrics: Metrics) -> dict[str, Any] | None:
    """The row of the first check that was flagged."""
    return next((row for row in metrics.rows if row["goodhart"]), None)
