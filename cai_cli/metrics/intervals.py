"""Estimates with 95% intervals: Wilson's score interval for a share, and a seeded bootstrap over whole clusters.

Rows that depend on each other (the votes on one pair, the pairs of one prompt) form one cluster, and the spread is that
between clusters. Treating the rows as independent would make every interval too narrow.

With few clusters the spread itself is uncertain, so every interval over clusters uses a quantile of Student's t. Its
degrees of freedom are those of the clusters that matter: one prompt with a hundred pairs is one prompt. With too few
clusters to tell anything the interval is as wide as the limits.

Several intervals of the same kind, such as the win rates of all pairs of models, can be simultaneous (`among`): with a
confidence of 95% all of them contain their values at once (Bonferroni). Otherwise one of twenty would exclude its value
by chance, and a table of them would contain a finding where there is none.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Generic, TypedDict, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

RESAMPLES = 2000
# More clusters than this share blocks evenly. Memory and time then stay the same for a million rows, and 2,000
# resamples of 2,000 blocks still determine the spread to 2%.
BLOCKS = 2000
LEVEL = 0.05  # of all simultaneous intervals together
Z = 1.959964  # the normal distribution's quantile for 95%
Limits = tuple[float, float]
SHARE: Limits = (0.0, 1.0)

Column = TypeVar("Column", bound=Hashable)


class Estimate(TypedDict):
    """A value with its 95% interval.

    Keys:
        value: The point estimate.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        n: Number of observations behind the value.
    """

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Estimate | None:
    """Return a share with its 95% Wilson score interval.

    Args:
        successes: Number of successes, from 0 to `n`; a tie may count as half.
        n: Number of trials.

    Returns:
        The share `successes / n` with its interval, or None if `n` is 0.

    Examples:
        >>> share = wilson(8, 10)
        >>> f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f}), n = {share['n']}"
        '0.80 (0.49 to 0.94), n = 10'
        >>> wilson(0, 0) is None
        True
    """
    if n == 0:
        return None
    return {"value": successes / n, **_score_interval(successes / n, n, Z), "n": n}


class Ends(TypedDict):
    """The ends of an interval."""

    low: float
    high: float


def _score_interval(p: float, n: float, quantile: float) -> Ends:
    """Return the ends of Wilson's interval of the share `p` of `n` independent trials."""
    k = quantile * quantile / n
    middle, half = p + k / 2, quantile * math.sqrt(p * (1 - p) / n + k / (4 * n))
    # At 0 and 1 one end equals the value; rounding must not move it past the value.
    low, high = max(0.0, (middle - half) / (1 + k)), min(1.0, (middle + half) / (1 + k))
    return {"low": min(low, p), "high": max(high, p)}


def t_quantile(clusters: float, among: int = 1) -> float:
    """Return the quantile of Student's t for one of `among` simultaneous two-sided 95% intervals.

    Args:
        clusters: Number of clusters, which may be a fraction; the degrees of freedom are one fewer.
        among: Number of intervals.

    Returns:
        The quantile; infinity where there is no more than one cluster.

    Examples:
        >>> round(t_quantile(11), 3), round(t_quantile(11, among=6), 3), t_quantile(1)
        (2.228, 3.277, inf)
    """
    from scipy.special import stdtrit

    quantile = float(stdtrit(clusters - 1, 1 - LEVEL / (2 * among))) if clusters > 1 else math.inf
    return quantile if math.isfinite(quantile) else math.inf


def fewest_clusters(among: int = 1) -> int:
    """Return the smallest number of clusters for which the interval of a share of 1 excludes one half.

    Examples:
        >>> fewest_clusters(), fewest_clusters(among=30)  # the interval of six of six still contains one half
        (7, 16)
    """
    return next(n for n in count(2) if t_quantile(n, among) ** 2 < n)


def clustered_share(parts: "Numbers", counts: "Numbers", among: int = 1) -> Estimate | None:
    """Return the share `sum(parts) / sum(counts)` with its 95% interval over clusters.

    It is Wilson's interval at the effective sample size, the number of independent trials that would have the variance
    found between the clusters, with a quantile of Student's t (after Korn and Graubard 1998). Where all rows agree, or
    all clusters do, that variance is 0, and every cluster counts as one trial.

    Args:
        parts: What each cluster adds to the numerator, from 0 to its count; a tie may count as half.
        counts: Number of observations of each cluster.
        among: Number of simultaneous intervals.

    Returns:
        The share, or None if nothing was counted.

    Examples:
        >>> import numpy as np
        >>> right, pairs = np.array([4, 0, 4, 4, 0, 4, 4, 4, 4, 4.0]), np.full(10, 4.0)
        >>> percent(clustered_share(right, pairs)), percent(wilson(32, 40))  # the pairs of a prompt agree
        ('80.0% (42.7% to 95.5%)', '80.0% (65.2% to 89.5%)')
    """
    parts, counts = parts[counts > 0], counts[counts > 0]
    n = float(counts.sum())
    if n == 0:
        return None
    p, clusters = float(parts.sum()) / n, len(counts)
    squares = float(((parts - p * counts) ** 2).sum())
    alike = effective_clusters(counts)
    binomial = p * (1 - p)
    if clusters == 1 or not math.isfinite(t_quantile(alike, among)):
        ends: Ends = {"low": 0.0, "high": 1.0}
    elif squares <= 1e-12 * n or binomial == 0:
        half = 1 - _score_interval(1.0, alike, t_quantile(alike, among))["low"]
        ends = {"low": max(0.0, p - half), "high": min(1.0, p + half)}
    else:
        pairs_of_rows = float((counts * counts - counts).sum())
        correlation = (squares / binomial - n) / pairs_of_rows if pairs_of_rows else 0.0
        quantile = t_quantile(effective_clusters(counts, min(1.0, max(0.0, correlation))), among)
        trials = binomial * n * n * (clusters - 1) / (clusters * squares)
        ends = _score_interval(p, trials, quantile)
    return {"value": p, **ends, "n": round(n)}


def effective_clusters(counts: "Numbers", correlation: float = 1.0) -> float:
    """Return how many clusters of equal size would determine the spread between clusters as well as these.

    The degrees of freedom follow Satterthwaite: the variance of a cluster's sum is proportional to
    m + correlation * (m^2 - m), with m its number of rows.

    Args:
        counts: Number of rows of each cluster.
        correlation: Correlation of the rows of one cluster, from 0 to 1.

    Examples:
        >>> import numpy as np
        >>> effective_clusters(np.array([3.0, 3.0, 3.0, 3.0])), round(effective_clusters(np.array([100.0, 1, 1, 1])), 2)
        (4.0, 1.0)
    """
    variances = counts + correlation * (counts * counts - counts)
    return float(variances.sum() ** 2 / (variances**2).sum())


def percent(share: Estimate) -> str:
    """Return a share and its interval in percent.

    Examples:
        >>> percent({"value": 0.5, "low": 0.25, "high": 0.75, "n": 8})
        '50.0% (25.0% to 75.0%)'
    """
    return with_interval(share, ".1%")


def with_interval(estimate: Estimate, form: str = ".2f") -> str:
    """Return a value and its interval, each number in the given format.

    Examples:
        >>> with_interval({"value": 0.65, "low": 0.6, "high": 0.7, "n": 8})
        '0.65 (0.60 to 0.70)'
        >>> with_interval({"value": 0.4, "low": -0.1, "high": 0.85, "n": 8}, "+.0%")
        '+40% (-10% to +85%)'
    """
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


def widened(estimate: Estimate, other: Estimate | None) -> Estimate:
    """Return `estimate` with an interval that also covers the interval of `other`."""
    if other is None:
        return estimate
    return {**estimate, "low": min(estimate["low"], other["low"]), "high": max(estimate["high"], other["high"])}


def resampled_interval(value: float, resamples: "Numbers", counts: "Numbers", limits: Limits, among: int = 1) -> Ends:
    """Return the 95% bootstrap interval of a value.

    It runs between percentiles of the resamples, shifted by their bias so that it is centred on the value, and widened
    by the ratio of Student's t to the normal quantile, because a bootstrap of few clusters is too narrow. One cluster
    alone does not determine a spread, so its interval is all of `limits`. Where all clusters agree, no two resamples
    differ; the interval then has the width that Wilson's interval has for a share of 1, scaled to `limits`.

    Args:
        value: The value over all clusters.
        resamples: The value over each resample of the clusters; one that is not finite is left out.
        counts: Number of observations of each cluster.
        limits: Smallest and largest possible value; the interval is cut to them.
        among: Number of simultaneous intervals.
    """
    import numpy as np

    resamples, counts = resamples[np.isfinite(resamples)], counts[counts > 0].astype(np.float64)
    effective = effective_clusters(counts)
    quantile = t_quantile(effective, among)
    low, high = limits
    if resamples.size and math.isfinite(quantile):
        wider = quantile / Z * math.sqrt(len(counts) / (len(counts) - 1))
        low, high = value + wider * (np.quantile(resamples, (0.025, 0.975)) - resamples.mean())
        # Means of equal values may differ in the last digit from resample to resample.
        if high - low <= 1e-12 * wider * max(1.0, abs(value)) and math.isfinite(limits[1] - limits[0]):
            half = (limits[1] - limits[0]) * (1 - _score_interval(1.0, effective, quantile)["low"])
            low, high = value - half, value + half
    return {"low": max(limits[0], min(float(low), value)), "high": min(limits[1], max(float(high), value))}


Statistic = Callable[[Mapping[Column, "Numbers"]], "Numbers"]


class ClusterBootstrap(Generic[Column]):
    """Sums by cluster, from which ratios, means and correlations get bootstrap intervals.

    Only sums are kept: a table of shape (blocks, columns). Cluster c belongs to block c % BLOCKS, so up to BLOCKS
    clusters have a block of their own.

    Args:
        columns: Names of the sums; any hashable values.

    Examples:
        >>> answers = ClusterBootstrap(["right", "n"])
        >>> for prompt in range(40):
        ...     answers.add(prompt, {"right": prompt % 4 != 0, "n": 1})
        >>> share = answers.share("right", "n")
        >>> share["value"], share["low"] < 0.75 < share["high"], share["n"]
        (0.75, True, 40)
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        import numpy as np

        self.columns = {name: place for place, name in enumerate(columns)}
        self.table: Numbers = np.zeros((BLOCKS, len(columns)))
        self.blocks = 0
        self._resampled: Numbers | None = None

    def add(self, cluster: int, values: Mapping[Column, float]) -> None:
        """Add `values` to the sums of `cluster`, which is counted from 0."""
        block = cluster % BLOCKS
        self.blocks = max(self.blocks, block + 1)
        self._resampled = None
        for name, value in values.items():
            self.table[block, self.columns[name]] += value

    def total(self, column: Column) -> float:
        """Return the sum of a column over all clusters."""
        return float(self.table[:, self.columns[column]].sum())

    def estimate(self, statistic: Statistic[Column], count: Column, limits: Limits, among: int = 1) -> Estimate | None:
        """Return a statistic of the sums with its 95% bootstrap interval; see `resampled_interval`.

        Args:
            statistic: Maps the sums, each column an array of shape (resamples,), to an array of that shape.
            count: The column that counts the observations.
            limits: Smallest and largest possible value; the interval is cut to them.
            among: Number of simultaneous intervals.

        Returns:
            The estimate, or None if nothing was counted or the statistic is not finite.
        """
        import numpy as np

        table = self.table[: self.blocks]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self._by_column(table.sum(0, keepdims=True)))[0])
            if self.clusters(count) == 0 or not math.isfinite(value):
                return None
            value = max(limits[0], min(limits[1], value))  # rounding must not move it past a limit
            if self._resampled is None:
                self._resampled = _block_counts(self.blocks) @ table
            resamples = statistic(self._by_column(self._resampled))
        ends = resampled_interval(value, resamples, self.by_cluster(count), limits, among)
        return {"value": value, **ends, "n": round(self.total(count))}

    def _by_column(self, rows: "Numbers") -> dict[Column, "Numbers"]:
        return {name: rows[:, place] for name, place in self.columns.items()}

    def share(self, part: Column, count: Column, among: int = 1) -> Estimate | None:
        """Return the share `part` / `count` with its 95% interval, as `clustered_share` does."""
        return clustered_share(self.by_cluster(part), self.by_cluster(count), among)

    def by_cluster(self, column: Column) -> "Numbers":
        """Return the sums of a column, shape (blocks,)."""
        return self.table[: self.blocks, self.columns[column]]

    def clusters(self, count: Column) -> int:
        """Return the number of blocks in which the column `count` is not zero."""
        return int((self.table[:, self.columns[count]] != 0).sum())


@lru_cache(maxsize=4)
def _block_counts(blocks: int) -> "Numbers":
    """Return how often each block occurs in each resample with replacement, shape (RESAMPLES, blocks). Seeded."""
    import numpy as np

    chosen = np.random.default_rng(0).integers(blocks, size=(RESAMPLES, blocks))
    chosen += np.arange(RESAMPLES)[:, None] * blocks
    return np.bincount(chosen.ravel(), minlength=RESAMPLES * blocks).reshape(RESAMPLES, blocks).astype(np.float64)


def mean_estimate(
    values: Sequence[float], limits: Limits, clusters: Sequence[Hashable] | None = None, among: int = 1
) -> Estimate | None:
    """Return the mean of `values` with its 95% interval.

    Args:
        values: One value a row.
        limits: Smallest and largest possible value.
        clusters: Cluster of each row, such as its prompt; None if every row is a separate cluster.
        among: Number of simultaneous intervals.

    Returns:
        The mean, or None if there are no values.

    Examples:
        >>> mean = mean_estimate([0.25, 0.5, 0.75], SHARE)
        >>> mean["value"], mean["low"] <= 0.25 < 0.75 <= mean["high"], mean["n"]
        (0.5, True, 3)
    """
    sums, places = ClusterBootstrap(["value", "n"]), dict[Hashable, int]()
    for row, value in enumerate(values):
        place = row if clusters is None else places.setdefault(clusters[row], len(places))
        sums.add(place, {"value": value, "n": 1})
    if limits == SHARE:
        return sums.share("value", "n", among)
    return sums.estimate(lambda s: s["value"] / s["n"], "n", limits, among)


def paired_difference(
    a: Sequence[float], b: Sequence[float], limits: Limits = (-1.0, 1.0), clusters: Sequence[Hashable] | None = None
) -> Estimate | None:
    """Return the mean of a - b over rows, by how much two judges of the same rows differ, with its 95% interval.

    Args:
        a: Values of the first judge, one a row.
        b: Values of the second judge, in the same order.
        limits: Smallest and largest possible difference.
        clusters: As for `mean_estimate`.

    Examples:
        >>> paired_difference([1, 1, 0, 1], [0, 1, 0, 1])["value"]
        0.25
    """
    return mean_estimate([x - y for x, y in zip(a, b, strict=True)], limits, clusters)


def weighted_mean(parts: Sequence[tuple[float, Estimate]]) -> Estimate | None:
    """Return the weighted mean of independent estimates with its interval, such as a score over strata.

    The distances from the mean to its ends are those of the parts, each times its weight, added in squares (MOVER; Zou
    and Donner 2008). Unlike a normal interval it keeps the width of a part whose observations all agree.

    Args:
        parts: Weight and estimate of each part; the weights need not sum to 1.

    Examples:
        >>> percent(weighted_mean([(1, wilson(8, 10)), (3, wilson(9, 10))]))
        '87.5% (63.4% to 94.6%)'
    """
    total = math.fsum(weight for weight, _ in parts)
    if total == 0:
        return None
    shares = [(weight / total, estimate) for weight, estimate in parts]
    value = math.fsum(w * e["value"] for w, e in shares)
    low = value - math.sqrt(math.fsum((w * (e["value"] - e["low"])) ** 2 for w, e in shares))
    high = value + math.sqrt(math.fsum((w * (e["high"] - e["value"])) ** 2 for w, e in shares))
    return {"value": value, "low": low, "high": high, "n": sum(e["n"] for _, e in shares)}
