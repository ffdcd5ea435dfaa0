"""Estimates with 95% intervals: Wilson's formula for a share, and a seeded bootstrap over whole clusters.

Rows that depend on each other (the votes on one pair, the pairs of one prompt) form one cluster, and a bootstrap draw
takes a cluster as a whole. Drawing its rows independently would make every interval too narrow.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypedDict, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

RESAMPLES = 2000
# More clusters than this share blocks evenly. Memory and time then stay the same for a million rows, and 2,000
# resamples of 2,000 blocks still determine the spread to 2%.
BLOCKS = 2000
# With fewer clusters than this the bootstrap interval of a share is too narrow: for six fair coins it misses one half
# three times too often.
FEW_CLUSTERS = 30
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
    z = 1.959964
    p, scale = successes / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 one end equals the value; rounding must not move it past the value.
    low, high = max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
    return {"value": p, "low": min(low, p), "high": max(high, p), "n": n}


def percent(share: Estimate) -> str:
    """Return a share and its interval in percent.

    Examples:
        >>> percent({"value": 0.5, "low": 0.25, "high": 0.75, "n": 8})
        '50.0% (25.0% to 75.0%)'
    """
    return f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"


def widened(estimate: Estimate, other: Estimate | None) -> Estimate:
    """Return `estimate` with an interval that also covers the interval of `other`."""
    if other is None:
        return estimate
    return {**estimate, "low": min(estimate["low"], other["low"]), "high": max(estimate["high"], other["high"])}


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

    def estimate(self, statistic: Statistic[Column], count: Column, limits: Limits) -> Estimate | None:
        """Return a statistic of the sums with its 95% bootstrap interval.

        The interval runs between percentiles of the resamples, shifted by their bias so that it is centred on the
        value. One cluster alone does not determine a spread, so its interval is all of `limits`. Where all clusters
        agree, no two resamples differ; the interval then has the width that Wilson's interval has for a share of 1,
        scaled to `limits`.

        Args:
            statistic: Maps the sums, each column an array of shape (resamples,), to an array of that shape.
            count: The column that counts the observations.
            limits: Smallest and largest possible value; the interval is cut to them.

        Returns:
            The estimate, or None if nothing was counted or the statistic is not finite.
        """
        import numpy as np

        table = self.table[: self.blocks]
        clusters = self.clusters(count)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self._by_column(table.sum(0, keepdims=True)))[0])
            if clusters == 0 or not math.isfinite(value):
                return None
            if self._resampled is None:
                self._resampled = _block_counts(self.blocks) @ table
            resamples = statistic(self._by_column(self._resampled))
        resamples = resamples[np.isfinite(resamples)]
        if clusters == 1 or not resamples.size:
            low, high = limits
        else:
            low, high = np.quantile(resamples, (0.025, 0.975)) + value - resamples.mean()
            certain = wilson(clusters, clusters)
            if low == high and certain and math.isfinite(limits[1] - limits[0]):
                half_width = (limits[1] - limits[0]) * (1 - certain["low"])
                low, high = value - half_width, value + half_width
        return {
            "value": value,
            "low": max(limits[0], min(float(low), value)),
            "high": min(limits[1], max(float(high), value)),
            "n": round(self.total(count)),
        }

    def _by_column(self, rows: "Numbers") -> dict[Column, "Numbers"]:
        return {name: rows[:, place] for name, place in self.columns.items()}

    def share(self, part: Column, count: Column) -> Estimate | None:
        """Return the share `part` / `count` with its 95% interval.

        With fewer than FEW_CLUSTERS clusters the interval is at least as wide as Wilson's interval over the clusters.
        """
        estimate, clusters = self.estimate(lambda s: s[part] / s[count], count, SHARE), self.clusters(count)
        if estimate and clusters < FEW_CLUSTERS:
            return widened(estimate, wilson(estimate["value"] * clusters, clusters))
        return estimate

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


def mean_estimate(values: Sequence[float], limits: Limits, clusters: Sequence[int] | None = None) -> Estimate | None:
    """Return the mean of `values` with its 95% bootstrap interval.

    Args:
        values: One value a row.
        limits: Smallest and largest possible value.
        clusters: Cluster number of each row; None if every row is a separate cluster.

    Returns:
        The mean, or None if there are no values.

    Examples:
        >>> mean = mean_estimate([0.25, 0.5, 0.75], SHARE)
        >>> mean["value"], mean["low"] <= 0.25 < 0.75 <= mean["high"], mean["n"]
        (0.5, True, 3)
    """
    sums = ClusterBootstrap(["value", "n"])
    for row, value in enumerate(values):
        sums.add(row if clusters is None else clusters[row], {"value": value, "n": 1})
    if limits == SHARE:
        return sums.share("value", "n")
    return sums.estimate(lambda s: s["value"] / s["n"], "n", limits)


def paired_difference(
    a: Sequence[float], b: Sequence[float], limits: Limits = (-1.0, 1.0), clusters: Sequence[int] | None = None
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
