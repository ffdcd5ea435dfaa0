"""Figures and how sure they are: 95% intervals by Wilson's formula or by a seeded bootstrap over whole clusters.

Rows that hang together (the votes on one pair, the pairs of one prompt) are one cluster and are drawn together:
drawn apart, they would make every interval too narrow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

REPLICATES = 2000
# Clusters beyond so many share blocks, evenly: memory and time stay the same for a million rows, and the spread of
# 2,000 draws of 2,000 blocks is known to 2%.
BLOCKS = 2000
# Of fewer clusters the bootstrap of a share is too narrow: of six coins it leaves out one half three times too often.
FEW = 30
Limits = tuple[float, float]
SHARE: Limits = (0.0, 1.0)


class Estimate(TypedDict):
    """A value, its 95% interval, and how many things it was counted over."""

    value: float
    low: float
    high: float
    n: int


def wilson(right: float, n: int) -> Estimate | None:
    """A share with its 95% Wilson interval; None of nothing."""
    if n == 0:
        return None
    z = 1.959964
    p, scale = right / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the end is the value itself; rounding must not put it on the other side.
    low, high = max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
    return {"value": p, "low": min(low, p), "high": max(high, p), "n": n}


Statistic = Callable[[Mapping[str, "Numbers"]], "Numbers"]


class ClusterBootstrap:
    """Named sums by block of clusters: all that a bootstrap of ratios, means and correlations needs.

    `table` is (blocks, columns); cluster c is counted in block c % BLOCKS, so up to BLOCKS clusters each stands alone.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        import numpy as np

        self.columns = {name: place for place, name in enumerate(columns)}
        self.table: Numbers = np.zeros((BLOCKS, len(columns)))
        self.blocks = 0
        self._drawn: Numbers | None = None

    def add(self, cluster: int, values: Mapping[str, float]) -> None:
        """Add to the sums of `cluster` (counted from 0)."""
        block = cluster % BLOCKS
        self.blocks = max(self.blocks, block + 1)
        self._drawn = None
        for name, value in values.items():
            self.table[block, self.columns[name]] += value

    def total(self, column: str) -> float:
        return float(self.table[:, self.columns[column]].sum())

    def figure(self, statistic: Statistic, count: str, limits: Limits) -> Estimate | None:
        """`statistic` of the sums with its bootstrap interval; it is given each column as an array over draws.

        The interval is that of the percentiles, moved by the draws' bias so that it lies about the value. `count`
        names the column that says over how many things; None where it is zero or the statistic undefined. One
        cluster alone says nothing about the spread: its interval is all of `limits`. Where every cluster says the same
        no draw can differ: as much of `limits` is left open then as Wilson leaves of a share that is 1.
        """
        import numpy as np

        table = self.table[: self.blocks]
        clusters = self.clusters(count)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self._named(table.sum(0, keepdims=True)))[0])
            if clusters == 0 or not math.isfinite(value):
                return None
            if self._drawn is None:
                self._drawn = _draws(self.blocks) @ table
            draws = statistic(self._named(self._drawn))
        draws = draws[np.isfinite(draws)]
        if clusters == 1 or not draws.size:
            low, high = limits
        else:
            low, high = np.quantile(draws, (0.025, 0.975)) + value - draws.mean()
            certain = wilson(clusters, clusters)
            if low == high and certain and math.isfinite(limits[1] - limits[0]):
                open_part = (limits[1] - limits[0]) * (1 - certain["low"])
                low, high = value - open_part, value + open_part
        return {
            "value": value,
            "low": max(limits[0], min(float(low), value)),
            "high": min(limits[1], max(float(high), value)),
            "n": round(self.total(count)),
        }

    def _named(self, rows: "Numbers") -> dict[str, "Numbers"]:
        return {name: rows[:, place] for name, place in self.columns.items()}

    def share(self, part: str, count: str) -> Estimate | None:
        """The share `part` / `count`; of a few clusters its interval is no narrower than Wilson's over the clusters."""
        figure, clusters = self.figure(lambda s: s[part] / s[count], count, SHARE), self.clusters(count)
        if figure and clusters < FEW and (whole := wilson(figure["value"] * clusters, clusters)):
            low, high = min(figure["low"], whole["low"]), max(figure["high"], whole["high"])
            return {**figure, "low": low, "high": high}
        return figure

    def clusters(self, count: str) -> int:
        """How many blocks count something in the column."""
        return int((self.table[:, self.columns[count]] != 0).sum())


@lru_cache(maxsize=4)
def _draws(blocks: int) -> "Numbers":
    """(REPLICATES, blocks): how often each block stands in each draw of as many with replacement. Seeded."""
    import numpy as np

    chosen = np.random.default_rng(0).integers(blocks, size=(REPLICATES, blocks))
    chosen += np.arange(REPLICATES)[:, None] * blocks
    return np.bincount(chosen.ravel(), minlength=REPLICATES * blocks).reshape(REPLICATES, blocks).astype(np.float64)


def mean_figure(values: Sequence[float], limits: Limits, clusters: Sequence[int] | None = None) -> Estimate | None:
    """The mean of rows with its bootstrap interval; `clusters` says which rows are drawn together (none: each alone).

    None of no rows.
    """
    sums = ClusterBootstrap(["value", "n"])
    for row, value in enumerate(values):
        sums.add(row if clusters is None else clusters[row], {"value": value, "n": 1})
    if limits == SHARE:
        return sums.share("value", "n")
    return sums.figure(lambda s: s["value"] / s["n"], "n", limits)


def paired_difference(
    a: Sequence[float], b: Sequence[float], limits: Limits = (-1.0, 1.0), clusters: Sequence[int] | None = None
) -> Estimate | None:
    """The mean of a - b, row by row, with its bootstrap interval: what two judges of the same rows differ by."""
    return mean_figure([x - y for x, y in zip(a, b, strict=True)], limits, clusters)
