"""Whether a judge reads the replies: the agreement of its two answers about the same pair, one in each order.

A judge that returns log-probabilities answers with log-odds, of the first reply against the second. For one pair let x
be the log-odds of the first reply in the order a, b, and y those in the order b, a. Exchanging the replies changes the
sign of what they contribute, and leaves what the position contributes:

    preference = (x - y) / 2        (for a; the label follows its sign)
    position   = (x + y) / 2

Null hypothesis: the judge does not read the replies. Then x and y are a position bias, the same in both orders, plus
noise that is independent between the orders. Under it x and y are not negatively correlated over pairs, and the
preference varies no more than the position does: E[preference^2] <= Var(position), with equality where the bias is the
same for every pair. The statistic is

    (E[preference^2] - Var(position)) / (E[preference^2] + Var(position))

which is the intraclass correlation, over pairs, of what the judge prefers in one order with what it prefers in the
other, after its mean position bias is subtracted: 1 for a judge whose answers are a constant bias plus its preference,
0 under the null hypothesis, and below 0 where the bias differs from pair to pair. A position bias that is the same for
all pairs has no effect on it, however large: such a bias cancels in the label. An interval above 0 rejects the null
hypothesis.

What this does not show: a preference that is stable but mistaken (for longer replies, or for the wrong reply) rejects
the null hypothesis too; only human labels reveal it. And a bias that differs from pair to pair hides a preference that
is smaller than its differences, because one answer in each order does not tell such a bias from noise.

Judgements in words (method `verdict`) have no log-odds. For them the audit compares winners; see `label_audit`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.data.schema import Vote
from cai_cli.metrics.intervals import ClusterBootstrap, Estimate, Z, widened

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

IN_WORDS = "verdict"
# A probability of 0 or 1 (the log-probabilities differ by more than a double resolves) counts as this close to it.
_LEAST = 2.0**-53
LARGEST_LOG_ODDS = math.log((1 - _LEAST) / _LEAST)
# With fewer prompts the interval covers almost every correlation, and nothing is claimed.
FEWEST_PROMPTS = 5
ORDER_SUMS = ("ordered", "preference_squares", "position", "position_squares")


def log_odds(p: float) -> float:
    """Return the natural logarithm of p / (1 - p), at most LARGEST_LOG_ODDS in size.

    Examples:
        >>> log_odds(0.5), round(log_odds(0.982), 1), round(log_odds(1.0), 1)
        (0.0, 4.0, 36.7)
    """
    return math.log(max(p, _LEAST) / max(1 - p, _LEAST))


def order_sums(by_principle: Iterable[Sequence[Vote]]) -> dict[str, float]:
    """Return the sums of one pair: its preference and its position part, each the mean over principles.

    Args:
        by_principle: The votes on the pair under each principle. Several votes in one order (sampled rationales) are
            averaged. A principle without votes in both orders, or judged in words, is left out.

    Examples:
        >>> def vote(order, p_first):
        ...     return Vote(principle_id="kind", method="choice", order=order, p_first=p_first, rationale=None)
        >>> sums = order_sums([[vote("ab", 0.9933), vote("ba", 0.9526)]])  # log-odds of 5 and 3
        >>> round(sums["preference_squares"], 2), round(sums["position"], 2)
        (1.0, 4.0)
    """
    parts = []
    for votes in by_principle:
        orders = [[v.p_first for v in votes if v.order == order and v.method != IN_WORDS] for order in ("ab", "ba")]
        if all(orders):
            x, y = (log_odds(math.fsum(p) / len(p)) for p in orders)
            parts.append(((x - y) / 2, (x + y) / 2))
    if not parts:
        return {}
    preference, position = (math.fsum(values) / len(parts) for values in zip(*parts, strict=True))
    return {
        "ordered": 1,
        "preference_squares": preference**2,
        "position": position,
        "position_squares": position**2,
    }


def between_orders(sums: "ClusterBootstrap[Any]") -> Estimate | None:
    """Return the correlation of the judge's preferences in the two orders, with its 95% interval over prompts.

    Args:
        sums: The sums of `order_sums`, by prompt.

    Returns:
        The estimate; None where no pair has log-odds in both orders, and where all answers are equal.
    """
    estimate = sums.estimate(_between_orders, "ordered", (-1.0, 1.0))
    return estimate and widened(estimate, fisher_interval(estimate))


def fisher_interval(correlation: Estimate) -> Estimate:
    """Return an intraclass correlation over `n` independent pairs with Fisher's 95% interval.

    On the scale of atanh it has the standard error 1 / sqrt(n - 3/2). A bootstrap interval must cover it: with few
    pairs the bootstrap is too narrow, and with any number it misses what is rare. A judge that picks the first reply in
    nine of ten answers, without reading, picks the second one in both orders of one pair in a hundred; where no such
    pair was drawn, no resample has one, and all of them show a correlation.

    Examples:
        >>> ends = fisher_interval({"value": 0.1, "low": 0.05, "high": 0.15, "n": 50})
        >>> round(ends["low"], 2), round(ends["high"], 2)
        (-0.18, 0.36)
    """
    if correlation["n"] < 2:
        return {**correlation, "low": -1.0, "high": 1.0}
    z = math.atanh(max(-0.999999, min(0.999999, correlation["value"])))
    half_width = Z / (correlation["n"] - 1.5) ** 0.5
    return {**correlation, "low": math.tanh(z - half_width), "high": math.tanh(z + half_width)}


def _between_orders(s: "Mapping[Any, Numbers]") -> "Numbers":
    preference, position = s["preference_squares"] / s["ordered"], position_variance(s)
    # Rounded, so that resamples of equal pairs are equal and get the interval of a certain share.
    return ((preference - position) / (preference + position)).round(12)


def position_variance(s: "Mapping[Any, Numbers]") -> "Numbers":
    """Return the variance of the position part over pairs, unbiased for independent pairs."""
    squares = s["position_squares"] - s["position"] ** 2 / s["ordered"]
    return squares.clip(0) / (s["ordered"] - 1)
