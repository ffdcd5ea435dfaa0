"""What a preference model is worth, on pairs it was not trained on (paper section 4.1).

With d = score of `chosen` - score of `rejected` (`margin`), the model's probability of `chosen` is sigmoid(d). All
figures are against the labels as they are, also where training hardened them. Equal scores are wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

from cai_cli.data.schema import JudgedPair
from cai_cli.metrics.intervals import Estimate, wilson

BINS = 5
RESAMPLES = 1000


def held_out_figures(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Every figure of the held-out pairs by name; a figure that cannot be had of these pairs is None."""
    overall = accuracy(pairs)
    chance = overall["low"] <= 0.5 <= overall["high"] if overall else None
    return {
        "accuracy": overall,
        "at_chance": chance,
        "accuracy_by_source": by_source(pairs),
        **loss_figures(pairs),
        **calibration(pairs),
        **score_figures(pairs),
        "note": note(overall),
    }


def note(overall: Estimate | None) -> str | None:
    """What must not be overlooked, in plain words."""
    if overall is None:
        return "No pair with a preferred reply was held out: nothing here says what the model learned."
    spread = f"{overall['value']:.1%} of {overall['n']:,} held-out pairs (95%: {overall['low']:.1%} to "
    spread += f"{overall['high']:.1%})"
    if overall["high"] < 0.5:
        return f"The preference model is wrong more often than a coin: right on {spread}."
    if overall["low"] <= 0.5:
        return f"The preference model cannot be told from a coin: right on {spread}."
    return None


def accuracy(pairs: Sequence[JudgedPair]) -> Estimate | None:
    """Share of pairs whose preferred reply has the higher score; pairs with p_chosen = 0.5 have none, and are out."""
    decided = [pair for pair in pairs if pair.p_chosen > 0.5]
    return wilson(sum(pair.margin > 0 for pair in decided), len(decided))


def by_source(pairs: Sequence[JudgedPair]) -> dict[str, Estimate | None]:
    """Accuracy by the `source` of the rows, so that AI and human labels, or two data sets, are seen apart."""
    sources = sorted({pair.source or "no source" for pair in pairs})
    return {name: accuracy([p for p in pairs if (p.source or "no source") == name]) for name in sources}


def loss_figures(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Mean cross-entropy in nats, the mean entropy of the labels, which no model can go below, and the gap."""
    if not pairs:
        return {"held_out_loss": None, "label_entropy": None, "loss_gap": None}
    loss = math.fsum(map(cross_entropy, pairs)) / len(pairs)
    floor = math.fsum(binary_entropy(pair.p_chosen) for pair in pairs) / len(pairs)
    return {"held_out_loss": loss, "label_entropy": floor, "loss_gap": loss - floor}


def cross_entropy(pair: JudgedPair) -> float:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d), in nats, for any d."""
    d = pair.margin
    return math.log1p(math.exp(-abs(d))) + max(-d, 0.0) + (1 - pair.p_chosen) * d


def binary_entropy(p: float) -> float:
    """In nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def calibration(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """The reliability curve and its expected calibration error.

    A pair counts from the side the model prefers: its confidence, sigmoid(|d|) in [0.5, 1], against the label's
    probability of that side. (Seen from `chosen`, which every label favours, no model would look calibrated.)
    """
    sides = [(1 / (1 + math.exp(-abs(pair.margin))), _label_of_preferred(pair)) for pair in pairs]
    edges = [0.5 + 0.5 * k / BINS for k in range(BINS + 1)]
    curve, error = [], 0.0
    for k in range(BINS):
        inside = [side for side in sides if min(int((side[0] - 0.5) * 2 * BINS), BINS - 1) == k]
        if not inside:
            continue
        confidence, label = (math.fsum(values) / len(inside) for values in zip(*inside, strict=True))
        curve.append({"from": edges[k], "to": edges[k + 1], "confidence": confidence, "label": label, "n": len(inside)})
        error += len(inside) / len(sides) * abs(confidence - label)
    return {"calibration_error": error if sides else None, "calibration_curve": curve}


def _label_of_preferred(pair: JudgedPair) -> float:
    if pair.margin == 0:
        return 0.5
    return pair.p_chosen if pair.margin > 0 else 1 - pair.p_chosen


def score_figures(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Mean and standard deviation of the scores of all replies, and their rank correlation with the reply's length."""
    from statistics import fmean, pstdev

    scores = [score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)]
    return {
        "score_mean": fmean(scores) if scores else None,
        "score_std": pstdev(scores) if scores else None,
        "length_correlation": length_correlation(pairs),
    }


def length_correlation(pairs: Sequence[JudgedPair]) -> Estimate | None:
    """Spearman's correlation of score and reply length in tokens over all replies, with a 95% bootstrap interval.

    Pairs are resampled, not replies, as two replies to one prompt are alike. None under ten pairs, and where all scores
    or all lengths are the same.
    """
    import numpy as np
    from scipy.stats import rankdata

    scores = np.array([(pair.chosen_score, pair.rejected_score) for pair in pairs])
    tokens = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs])
    if len(pairs) < 10 or np.ptp(scores) == 0 or np.ptp(tokens) == 0:
        return None

    def spearman(which: Any) -> float:
        ranks = np.stack([rankdata(values[which].ravel()) for values in (scores, tokens)])
        # A resample of one value has no rank order and says nothing either way.
        return float(np.corrcoef(ranks)[0, 1]) if (np.ptp(ranks, axis=1) > 0).all() else 0.0

    rng = np.random.default_rng(0)
    drawn = [spearman(rng.integers(len(pairs), size=len(pairs))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"value": spearman(np.arange(len(pairs))), "low": low, "high": high, "n": 2 * len(pairs)}
