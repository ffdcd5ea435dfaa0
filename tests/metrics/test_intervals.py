"""Intervals contain the value, narrow with more rows, are reproducible to the bit, and agree with scipy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cai_cli.metrics.intervals import (
    BLOCKS,
    SHARE,
    ClusterBootstrap,
    clustered_share,
    fewest_clusters,
    mean_estimate,
    paired_difference,
    t_quantile,
    wilson,
)

Numbers = NDArray[np.float64]

shares = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60)


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_agrees_with_scipy(right: int, more: int) -> None:
    n = right + more
    found = wilson(right, n)
    assert found is not None
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found["value"], found["n"]) == (right / n, n)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_no_rows_have_no_estimate() -> None:
    assert wilson(0, 0) is None
    assert mean_estimate([], SHARE) is None
    assert ClusterBootstrap(["a", "n"]).share("a", "n") is None


@settings(deadline=None)  # a bootstrap takes milliseconds, but on a busy machine not always
@given(shares)
def test_an_interval_contains_its_value_lies_within_the_limits_and_is_reproducible(values: list[float]) -> None:
    found = mean_estimate(values, SHARE)
    assert found is not None
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["value"] == pytest.approx(sum(values) / len(values))
    assert found["n"] == len(values)
    assert found == mean_estimate(values, SHARE)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=40).filter(lambda v: 0 < sum(v) < len(v)))
def test_four_times_the_rows_halve_the_interval(values: list[float]) -> None:
    one, four = mean_estimate(values, SHARE), mean_estimate(values * 4, SHARE)
    assert one is not None
    assert four is not None
    width, narrower = one["high"] - one["low"], four["high"] - four["low"]
    assert narrower < width
    if 0.2 < one["value"] < 0.8:
        assert narrower == pytest.approx(width / 2, rel=0.3)


@pytest.mark.parametrize("n", [30, 400])
def test_the_bootstrap_of_a_mean_agrees_with_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(1, 2, n)
    found = mean_estimate(values.tolist(), (-math.inf, math.inf))
    assert found is not None
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(theirs.low, abs=0.06 * width)
    assert found["high"] == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_bootstrap_of_a_correlation_agrees_with_scipy() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=200)
    y = 0.6 * x + rng.normal(size=200)
    sums = ClusterBootstrap(["n", "x", "y", "xx", "xy", "yy"])
    for row, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        sums.add(row, {"n": 1, "x": a, "y": b, "xx": a * a, "xy": a * b, "yy": b * b})
    found = sums.estimate(
        lambda s: (
            (s["xy"] - s["x"] * s["y"] / s["n"])
            / ((s["xx"] - s["x"] ** 2 / s["n"]) * (s["yy"] - s["y"] ** 2 / s["n"])) ** 0.5
        ),
        "n",
        (-1.0, 1.0),
    )
    assert found is not None
    theirs = stats.bootstrap(
        (x, y), lambda a, b: stats.pearsonr(a, b)[0], paired=True, vectorized=False, n_resamples=2000,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert found["value"] == pytest.approx(stats.pearsonr(x, y)[0])
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_rows_of_one_cluster_are_resampled_together() -> None:
    values = [float(i // 10 % 2) for i in range(400)]
    apart, together = mean_estimate(values, SHARE), mean_estimate(values, SHARE, [i // 10 for i in range(400)])
    assert apart is not None
    assert together is not None
    assert (together["high"] - together["low"]) / (apart["high"] - apart["low"]) == pytest.approx(
        math.sqrt(10), rel=0.1
    )


def test_one_cluster_alone_does_not_determine_the_spread() -> None:
    assert mean_estimate([0.2, 0.4], (-1.0, 1.0), [0, 0]) == {"value": pytest.approx(0.3), "low": -1, "high": 1, "n": 2}


def test_equal_rows_have_wilsons_interval_with_a_quantile_of_students_t() -> None:
    found, quantile = mean_estimate([1.0] * 10, SHARE), stats.t.ppf(0.975, 9)
    assert found is not None
    assert (found["value"], found["high"], found["n"]) == (1, 1, 10)
    assert found["low"] == pytest.approx(10 / (10 + quantile**2))  # 0.66: ten of ten do not prove nine of ten
    assert mean_estimate([1.0] * 40, SHARE, [i // 4 for i in range(40)]) == found | {"n": 40}


def test_more_clusters_than_blocks_give_the_interval_of_the_closed_form() -> None:
    n = 5 * BLOCKS + 7
    values = (np.random.default_rng(2).random(n) < 0.3).astype(float).tolist()
    found, exact = mean_estimate(values, SHARE), wilson(int(sum(values)), n)
    assert found is not None
    assert exact is not None
    assert found["n"] == n
    assert found["high"] - found["low"] == pytest.approx(exact["high"] - exact["low"], rel=0.1)


def test_what_two_judges_share_cancels_in_their_difference() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(200)
    a, b = (rng.random(200) < hard).astype(float), (rng.random(200) < hard - 0.05).astype(float)
    found = paired_difference(a.tolist(), b.tolist())
    assert found is not None
    assert found["value"] == pytest.approx(a.mean() - b.mean())
    spread = 2 * 1.96 * (a - b).std() / math.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(spread, rel=0.1)
    same = [float(i % 2) for i in range(100)]
    alike = paired_difference(same, same)
    assert alike == {
        "value": 0,
        "low": pytest.approx(-0.076, abs=1e-3),
        "high": pytest.approx(0.076, abs=1e-3),
        "n": 100,
    }


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 11, 15, 17, 20, 29, 40])
def test_a_fair_coin_is_rarely_called_biased(n: int) -> None:
    """How often the interval lies above or below one half; Wilson's own does for one in eight of four coins."""
    by_chance = 0.0
    for heads in range(n + 1):
        found = mean_estimate([1.0] * heads + [0.0] * (n - heads), SHARE)
        assert found is not None
        by_chance += math.comb(n, heads) / 2**n * (found["low"] > 0.5 or found["high"] < 0.5)
    assert by_chance < 0.055


def missed(parts: Numbers, counts: Numbers, true: float) -> float:
    """In what share of runs the interval misses the true share; both arrays have the shape (runs, clusters)."""
    found = [clustered_share(p, n) for p, n in zip(parts, counts, strict=True)]
    return float(np.mean([e is None or not e["low"] <= true <= e["high"] for e in found]))


@pytest.mark.parametrize("prompts", [10, 20, 50, 200])
@pytest.mark.parametrize("pairs", ["one", "four, independent", "four, equal", "one to eight, equal", "one or twenty"])
def test_an_interval_over_prompts_misses_the_true_share_in_one_of_twenty_runs_at_most(prompts: int, pairs: str) -> None:
    rng, runs = np.random.default_rng(prompts), 1500
    counts = np.full((runs, prompts), 1 if pairs == "one" else 4)
    if pairs == "one to eight, equal":
        counts = rng.integers(1, 9, counts.shape)
    if pairs == "one or twenty":
        counts = np.where(rng.random(counts.shape) < 0.1, 20, 1)
    equal = rng.integers(0, 2, counts.shape) * counts
    parts = rng.binomial(counts, 0.5) if pairs == "four, independent" else equal
    assert missed(parts.astype(float), counts.astype(float), 0.5) < 0.07


@pytest.mark.parametrize("prompts", [20, 50, 200])
@pytest.mark.parametrize("ties", [0.5, 0.9])
def test_ties_make_no_claim_more_likely(prompts: int, ties: float) -> None:
    rng = np.random.default_rng(prompts)
    values = np.where(rng.random((1500, prompts)) < ties, 0.5, rng.integers(0, 2, (1500, prompts)))
    assert missed(values, np.ones_like(values), 0.5) < 0.06


@pytest.mark.parametrize("n", [5, 10, 40])
def test_the_bootstrap_of_a_mean_of_few_rows_is_as_wide_as_students_t(n: int) -> None:
    values = np.random.default_rng(n).normal(1, 2, n)
    found = mean_estimate(values.tolist(), (-math.inf, math.inf))
    assert found is not None
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert found["high"] - found["low"] == pytest.approx(theirs.high - theirs.low, rel=0.12)


def test_one_prompt_with_most_of_the_rows_is_one_prompt() -> None:
    counts = np.array([100.0] + [1.0] * 9)
    found = clustered_share(counts, counts)
    assert found is not None
    assert found["low"] < 0.1


@pytest.mark.parametrize("tosses", [10, 20, 50])
def test_of_twelve_fair_coins_none_looks_biased_in_nineteen_of_twenty_runs(tosses: int) -> None:
    def some_looks_biased(among: int) -> float:
        one = 0.0
        for heads in range(tosses + 1):
            coin = np.array([1.0] * heads + [0.0] * (tosses - heads))
            found = clustered_share(coin, np.ones(tosses), among)
            assert found is not None
            one += math.comb(tosses, heads) / 2**tosses * (not found["low"] <= 0.5 <= found["high"])
        return 1 - (1 - one) ** 12

    assert some_looks_biased(among=12) < 0.05
    assert some_looks_biased(among=1) > 0.2


def test_the_quantile_of_simultaneous_intervals_is_bonferronis() -> None:
    assert t_quantile(20, among=6) == pytest.approx(stats.t.isf(0.05 / 12, 19))
    assert t_quantile(1) == t_quantile(0.5) == math.inf
    least = fewest_clusters(among=6)
    for clusters, told in ((least - 1, False), (least, True)):
        found = clustered_share(np.ones(clusters), np.ones(clusters), 6)
        assert found is not None
        assert (found["low"] > 0.5) == told
