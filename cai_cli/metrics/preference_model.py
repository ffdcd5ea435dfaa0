"""Metrics of a preference model on held-out pairs (paper section 4.1).

With d = score of `chosen` - score of `rejected` (`margin`), the model's probability of `chosen` is sigmoid(d). All
metrics use the recorded soft labels, even if the model was trained on hard ones. Equal scores count as wrong.

The pairs of one prompt share replies, so every interval is computed over prompts. Treated as independent, eight pairs a
prompt put a model that is independent of the labels above or below chance far more often than in one run of twenty.
"""

import math
from collections.abc import Sequence
from typing import Any

from cai_cli.data.schema import JudgedPair
from cai_cli.metrics.calibration import BINS, bin_ends, bin_of, calibration_error, error_if_calibrated
from cai_cli.metrics.intervals import (
    SHARE,
    Estimate,
    Limits,
    fewest_clusters,
    mean_estimate,
    resampled_interval,
)

RESAMPLES = 1000
MIN_PAIRS = 10  # for a rank correlation
SIGNED: Limits = (-1.0, 1.0)


def held_out_metrics(pairs: Sequence[JudgedPair], subject: str = "The preference model") -> dict[str, Any]:
    """Return every metric of the held-out pairs by name.

    Args:
        pairs: Pairs with the scores of both replies (logits) and their lengths in tokens.
        subject: What gave the scores, as the subject of a sentence.

    Returns:
        `held_out_prompts`, `accuracy` (overall and by source), `at_chance`, losses and entropies in nats, the
        calibration curve, mean and spread of the scores, and `note`, a warning in one sentence or None. A metric that
        these pairs do not determine is None.
    """
    overall, prompts = accuracy(pairs), len(set(_prompts(pairs)))
    chance = overall["low"] <= 0.5 <= overall["high"] if overall else None
    return {
        "held_out_prompts": prompts,
        "accuracy": overall,
        "at_chance": chance,
        "accuracy_by_source": accuracy_by_source(pairs),
        **loss_metrics(pairs),
        **calibration(pairs),
        **score_metrics(pairs),
        "note": accuracy_warning(overall, prompts, subject),
    }


def _prompts(pairs: Sequence[JudgedPair]) -> list[str]:
    """Return the prompt of each pair; a pair that was recorded without one stands for itself."""
    return [pair.prompt_id or f"{place} {pair.id}" for place, pair in enumerate(pairs)]


def accuracy_warning(overall: Estimate | None, prompts: int, subject: str = "The preference model") -> str | None:
    """Return a warning where the accuracy is missing or not above chance, else None.

    Args:
        overall: The accuracy.
        prompts: Number of prompts that the pairs belong to.
        subject: What gave the scores, as the subject of a sentence.

    Examples:
        >>> accuracy_warning({"value": 0.9, "low": 0.82, "high": 0.94, "n": 100}, prompts=100) is None
        True
        >>> accuracy_warning({"value": 0.1, "low": 0.02, "high": 0.4, "n": 10}, prompts=10)
        'The preference model is worse than chance: right on 10.0% of 10 held-out pairs (95%: 2.0% to 40.0%).'
    """
    if overall is None:
        return "No pair with a preferred reply was held out, so it is unknown what the model learned."
    spread = f"{overall['value']:.1%} of {overall['n']:,} held-out pairs (95%: {overall['low']:.1%} to "
    spread += f"{overall['high']:.1%})"
    if overall["high"] < 0.5:
        return f"{subject} is worse than chance: right on {spread}."
    if overall["low"] > 0.5:
        return None
    if prompts < fewest_clusters():
        belong = f"They belong to {prompts} prompt{'s' * (prompts != 1)}"
        few = f"{belong}, too few for any result: {fewest_clusters()} or more are needed."
        return f"{subject} cannot be distinguished from chance: right on {spread}. {few}"
    return f"{subject} cannot be distinguished from chance: right on {spread}."


def accuracy(pairs: Sequence[JudgedPair], among: int = 1) -> Estimate | None:
    """Return the share of pairs whose preferred reply has the higher score, with its interval over prompts.

    Args:
        pairs: The pairs. Those with p_chosen = 0.5 have no preferred reply and are left out.
        among: Number of simultaneous intervals.
    """
    decided = [pair for pair in pairs if pair.p_chosen > 0.5]
    return mean_estimate([float(pair.margin > 0) for pair in decided], SHARE, _prompts(decided), among)


def accuracy_by_source(pairs: Sequence[JudgedPair]) -> dict[str, Estimate | None]:
    """Return the accuracy for each `source` of the rows, such as AI and human labels, with simultaneous intervals."""
    groups: dict[str, list[JudgedPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.source or "no source", []).append(pair)
    return {name: accuracy(groups[name], len(groups)) for name in sorted(groups)}


def loss_metrics(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return the mean cross-entropy, the mean entropy of the labels (its lower bound) and their difference, in nats."""
    if not pairs:
        return {"held_out_loss": None, "label_entropy": None, "loss_gap": None}
    loss = math.fsum(map(cross_entropy, pairs)) / len(pairs)
    entropy = math.fsum(binary_entropy(pair.p_chosen) for pair in pairs) / len(pairs)
    return {"held_out_loss": loss, "label_entropy": entropy, "loss_gap": loss - entropy}


def cross_entropy(pair: JudgedPair) -> float:
    """Return -p log sigmoid(d) - (1 - p) log sigmoid(-d) in nats, without overflow for any d."""
    d = pair.margin
    return math.log1p(math.exp(-abs(d))) + max(-d, 0.0) + (1 - pair.p_chosen) * d


def binary_entropy(p: float) -> float:
    """Return the entropy of a coin with probability `p`, in nats.

    Examples:
        >>> round(binary_entropy(0.5), 4), binary_entropy(1.0) == 0
        (0.6931, True)
    """
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def calibration(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return the reliability curve and the expected calibration error.

    Each pair is seen from the side that the model prefers: its confidence, sigmoid(|d|) in [0.5, 1], is compared with
    the label's probability of that side. Seen from `chosen`, which every label favours, no model would look calibrated.

    Returns:
        `calibration_error` in [0, 1] and `calibration_error_if_calibrated`, its mean for a calibrated model with the
        same confidences (both None without pairs), and `calibration_curve`: for each bin with pairs, its ends, mean
        confidence, mean label and number of pairs.

    Examples:
        >>> ids = {"id": "p", "source": None, "chosen_tokens": 5, "rejected_tokens": 5}
        >>> pair = JudgedPair(**ids, p_chosen=1.0, chosen_score=1.0, rejected_score=0.0)
        >>> round(calibration([pair])["calibration_error"], 3)  # confidence sigmoid(1) = 0.731, label 1
        0.269
    """
    import numpy as np

    if not pairs:
        return {"calibration_error": None, "calibration_error_if_calibrated": None, "calibration_curve": []}
    confidence = np.array([1 / (1 + math.exp(-abs(pair.margin))) for pair in pairs])
    labels = np.array([_label_of_preferred(pair) for pair in pairs])
    bins = np.array([bin_of(p) for p in confidence.tolist()])
    _, prompts = np.unique(_prompts(pairs), return_inverse=True)
    gaps = np.zeros((prompts.max() + 1, BINS))
    np.add.at(gaps, (prompts, bins), confidence - labels)
    curve = []
    for k in np.unique(bins).tolist():
        means = {"confidence": float(confidence[bins == k].mean()), "label": float(labels[bins == k].mean())}
        curve.append({**bin_ends(k), **means, "n": int((bins == k).sum())})
    return {
        "calibration_error": calibration_error(gaps, len(pairs)),
        "calibration_error_if_calibrated": error_if_calibrated(gaps, len(pairs)),
        "calibration_curve": curve,
    }


def _label_of_preferred(pair: JudgedPair) -> float:
    if pair.margin == 0:
        return 0.5
    return pair.p_chosen if pair.margin > 0 else 1 - pair.p_chosen


def score_metrics(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return mean and standard deviation of the scores of all replies, and their rank correlation with reply length."""
    from statistics import fmean, pstdev

    scores = [score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)]
    return {
        "score_mean": fmean(scores) if scores else None,
        "score_std": pstdev(scores) if scores else None,
        "length_correlation": length_correlation(pairs),
    }


def length_correlation(pairs: Sequence[JudgedPair]) -> Estimate | None:
    """Return Spearman's correlation of score and reply length in tokens over all replies, with its 95% interval.

    The bootstrap resamples prompts, not replies or pairs, because the replies to one prompt depend on each other.

    Returns:
        The correlation in [-1, 1]; None with fewer than ten pairs, or where all scores or all lengths are equal.
    """
    import numpy as np
    from scipy.stats import rankdata

    scores = np.array([(pair.chosen_score, pair.rejected_score) for pair in pairs])
    tokens = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs])
    if len(pairs) < MIN_PAIRS or np.ptp(scores) == 0 or np.ptp(tokens) == 0:
        return None

    def spearman(rows: Any) -> float:
        ranks = np.stack([rankdata(values[rows].ravel()) for values in (scores, tokens)])
        # A resample of equal values has no rank order and counts as no correlation.
        return float(np.corrcoef(ranks)[0, 1]) if (np.ptp(ranks, axis=1) > 0).all() else 0.0

    _, prompts, counts = np.unique(_prompts(pairs), return_inverse=True, return_counts=True)
    rows_of = np.split(np.argsort(prompts, kind="stable"), np.cumsum(counts)[:-1])
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(counts), size=len(counts)) for _ in range(RESAMPLES))
    resamples = np.array([spearman(np.concatenate([rows_of[prompt] for prompt in prompts])) for prompts in drawn])
    value = spearman(np.arange(len(pairs)))
    ends = resampled_interval(value, resamples, counts.astype(np.float64), SIGNED)
    return {"value": value, "low": ends["low"], "high": ends["high"], "n": 2 * len(pairs)}
