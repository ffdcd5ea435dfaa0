"""The metrics of `cai rl`: the columns of metrics.jsonl and what the manifest keeps of them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cai_cli.phase2_feedback.reward_normalizer import RewardNormalizer
from cai_cli.phase2_feedback.rl_monitor import flagged
from cai_cli.phase2_feedback.rl_rewards import RewardSource
from cai_cli.training.metrics_log import Metrics

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
    "sampling_logp_difference": "sampling_logp_difference",
    "importance_ratio_max": "importance_ratio_max",
    "importance_weight": "sampling/importance_sampling_ratio/mean",
}
# Logged with a judge.
JUDGE_COLUMNS = ("no_reward_share", "judge_failed_share", "judge_alike_share", "judge_spread")


def step_columns(sources: Sequence[RewardSource]) -> dict[str, str]:
    """Name in metrics.jsonl -> name in the trainer's log, of the metrics of a step."""
    names = [source.name for source in sources]
    added = JUDGE_COLUMNS if "judge" in names else ()
    parts = [f"{name}_reward" for name in names] if len(names) > 1 else []
    return COLUMNS | {name: name for name in (*added, *parts)}


def manifest_metrics(metrics: Metrics, normalizers: Mapping[str, RewardNormalizer], kept: int) -> dict[str, Any]:
    """The metrics for the manifest, about the model that is kept.

    Args:
        metrics: The metrics of all steps and checks.
        normalizers: The normalizers of the reward, by its parts.
        kept: The step whose weights are kept, 0 where no step was better than the start model.

    Returns:
        `kept_step` is `kept`; `score_mean` and `score_std`, the unit of `reward` and `pm_score`, are logits, and those
        of the judge nats; shares are means over the steps; `kl` is in nats per token, as TRL logs it; `_before` marks
        the start model's.
    """
    trained = [row for row in metrics.rows if row["loss"] is not None]
    rewarded = [row for row in trained if row["reward"] is not None] or trained  # a judge may refuse in a whole step
    last = [row for row in rewarded if row["step"] <= kept][-1:] or rewarded[:1]
    checks = [row for row in metrics.rows if row["held_out_kl"] is not None]
    scores = [f"{name}_score" for name in normalizers]
    kept_check = next((row for row in checks if row["step"] == kept), checks[-1])
    flag = flagged(metrics)
    return {
        "steps": metrics.rows[-1]["step"],
        "kept_step": kept,
        **_units(normalizers),
        **_judge_shares(trained, normalizers),
        "reward_before": rewarded[0]["reward"],
        **{name: last[0][name] for name in ("reward", "kl", "cut_off_share", "reply_tokens")},
        **{f"{name}_before": checks[0][name] for name in (*scores, "monitor_score")},
        **{name: kept_check[name] for name in (*scores, "monitor_score")},
        "goodhart": flag["goodhart"] if flag else None,
        "goodhart_step": flag["step"] if flag else None,
    }


def _units(normalizers: Mapping[str, RewardNormalizer]) -> dict[str, float]:
    units: dict[str, float] = {}
    for name, normalizer in normalizers.items():
        prefix = "" if name == "pm" else f"{name}_"
        units |= {f"{prefix}score_mean": normalizer.mean, f"{prefix}score_std": normalizer.std}
    return units


def _judge_shares(
    trained: Sequence[Mapping[str, Any]], normalizers: Mapping[str, RewardNormalizer]
) -> dict[str, float | None]:
    """What the judge did over all steps, and its spread on the start model's replies."""
    if "judge" not in normalizers:
        return {}
    means = {}
    for name in ("judge_failed_share", "no_reward_share", "judge_alike_share"):
        values = [row[name] for row in trained if row[name] is not None]
        means[name] = fmean(values) if values else None
    return means | {"judge_spread": normalizers["judge"].spread}
