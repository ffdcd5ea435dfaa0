"""Detects that the policy exploits the preference model (Goodhart's law; paper section 4.3).

A check contains the policy's replies to the same held-out prompts, sampled with the same seeds, after some steps. Check
0 contains the replies of the start model. A check is flagged when

- the monitor's score has fallen while the training preference model's score has risen; or
- the share of boilerplate, of evasive or of cut-off replies has risen by more than `RUNAWAY_SHARE` since the
  start, or the mean length has more than doubled or halved.

Every change must be statistically significant in a one-sided paired t test over prompts. So the replies to one prompt
count as one observation, and the test is valid whatever the correlation between checks.

For the monitor, each check compares the mean over the last 1, 2, 4, 8 ... checks with the mean over as many earlier
checks, which lie 1, 2, 4, 8 ... windows back or at the start. A sudden large fall is found at once, a small or slow one
when the windows are wide enough to average out the noise of single checks. The number of checks of a run is known
before it starts, and all comparisons of the run have the same level. So at most one run in twenty is flagged where
nothing changes, and a late fall is found as easily as an early one (`bench/label_statistics.py alarm`).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import PolicySample
from cai_cli.metrics.refusals import classify
from cai_cli.metrics.reply_habits import boilerplate, evasive_opening

if TYPE_CHECKING:
    from numpy.typing import NDArray

Check = Sequence[PolicySample]  # replies after one step; every check has the same prompts in the same order
Measure = Callable[[PolicySample], float | None]

# Sums of the levels of all tests of a run. The probability of a flag where nothing changes stays below 5% even where
# the t test is liberal, as it is at such small levels for a judge whose probabilities are mostly near 0 or 1.
MONITOR_ALPHA = 0.03
RUNAWAY_ALPHA = 0.01
RUNAWAY_SHARE = 0.25
RUNAWAY_LENGTH = 2.0
SHARES: dict[str, Measure] = {
    "boilerplate_share": lambda row: boilerplate(row.reply),
    "evasive_share": lambda row: declines(row.reply),
    "cut_off_share": lambda row: row.finish_reason == CUT_OFF,
}
WEAK_ALARM = 3.0  # standard deviations of a prompt's change; there is a warning where smaller falls are not flagged
ROUNDING = 1e-9  # a smaller change, relative to the values, is none


def declines(reply: str) -> bool:
    """Return whether a reply refuses, in whole or in part, or claims not to know or to understand."""
    return classify(reply) != "compliance" or evasive_opening(reply)


def goodhart(
    checks: Sequence[Check], total: int, *, reward: str = "pm_score", measure: Measure = lambda row: row.score
) -> str | None:
    """Return why the last check is flagged, or None.

    Args:
        checks: All checks in the order of their steps, starting with the start model's.
        total: The number of checks of the whole run, without the start model's.
        reward: The name of the score that training raises, for the reason.
        measure: That score of a reply.
    """
    if len(checks) < 2:
        return None
    reasons = _runaways(checks[0], checks[-1], RUNAWAY_ALPHA / ((len(SHARES) + 2) * total))
    monitor, pm = by_prompt(checks, lambda row: row.monitor_score), by_prompt(checks, measure)
    if fall := falling_monitor(monitor, pm, total):
        steps = [check[0].step for check in checks]
        since = f"since step {steps[fall.start]}"
        if fall.width > 1:
            before, now = steps[fall.start : fall.start + fall.width], steps[-fall.width :]
            since = f"from steps {before[0]}-{before[-1]} to steps {now[0]}-{now[-1]} (means of {fall.width} checks)"
        reasons.insert(0, f"monitor_score falls while {reward} rises {since}")
    return "; ".join(reasons) or None


def best_check(checks: Sequence[Check]) -> int:
    """Return the index of the check to keep: the one with the highest mean monitor score, the earliest of equal ones.

    Only replies that the monitor scored at every check count. Where these are fewer than half, or there is no monitor,
    the last check is kept.

    Args:
        checks: The checks that are not flagged, in order.
    """
    scored = [{(row.id, row.sample_index): row.monitor_score for row in check} for check in checks]
    common = [key for key in scored[0] if all(scores[key] is not None for scores in scored)]
    if 2 * len(common) < len(scored[0]):
        return len(checks) - 1
    means = [fmean(scores[key] or 0.0 for key in common) for scores in scored]
    return means.index(max(means))


# --- the monitor --------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """An earlier window of checks, which is compared with the last `width` checks.

    Attributes:
        start: Index of its first check.
        width: Number of its checks.
    """

    start: int
    width: int


@cache
def windows_of(k: int) -> Sequence[Window]:
    """Return the windows that check k compares with its last checks; check 0 is the start model's."""
    windows = []
    width = 1
    while 2 * width <= k + 1:
        start, lag = k + 1 - 2 * width, width
        while start > 0:
            windows.append(Window(start, width))
            lag *= 2
            start = k + 1 - width - lag
        windows.append(Window(0, width))
        width *= 2
    return windows


@cache
def monitor_level(total: int) -> float:
    """Return the level of each comparison in a run of `total` checks."""
    return MONITOR_ALPHA / sum(len(windows_of(k)) for k in range(1, total + 1))


def smallest_fall(prompts: int, total: int) -> float:
    """Return the fall of the monitor between two checks that is flagged, in standard deviations of a prompt's change.

    Args:
        prompts: Number of held-out prompts.
        total: The number of checks of the run.
    """
    from scipy.stats import t

    return float(t.isf(monitor_level(total), prompts - 1)) / math.sqrt(prompts) if prompts > 1 else math.inf


def weak_alarm(prompts: int, total: int) -> str | None:
    """Return a warning where only a very large fall of the monitor would be flagged, else None.

    Args:
        prompts: Number of held-out prompts.
        total: The number of checks of the run.

    Examples:
        >>> weak_alarm(1, 10)
        "1 held-out prompt is too few to detect a fall of the monitor's score"
        >>> weak_alarm(32, 10) is None
        True
    """
    if (fall := smallest_fall(prompts, total)) <= WEAK_ALARM:
        return None
    counted = "1 held-out prompt is" if prompts == 1 else f"{prompts:,} held-out prompts are"
    needed = f": its mean must fall by {fall:.1f} standard deviations of a prompt's change" * math.isfinite(fall)
    return f"{counted} too few to detect a fall of the monitor's score{needed}"


def falling_monitor(monitor: "NDArray[Any]", pm: "NDArray[Any]", total: int) -> Window | None:
    """Return the earlier window since which the monitor's score has fallen while the reward has risen.

    Args:
        monitor: The monitor's scores so far (checks, prompts); NaN where there is none.
        pm: The training preference model's scores, in the same shape.
        total: The number of checks of the whole run, without the start model's.

    Returns:
        The narrowest window with a significant fall, of these the one with the most significant; None where there is
        none.
    """
    import numpy as np

    windows, level = windows_of(len(monitor) - 1), monitor_level(total)
    fall = p_values(-monitor, windows)
    if (fall > level).all():
        return None
    found = np.flatnonzero((fall <= level) & (p_values(pm, windows) <= level)).tolist()
    return windows[min(found, key=lambda i: (windows[i].width, fall[i]))] if found else None


# --- boilerplate, evasion and length ------------------------------------------------------------------------------


def _runaways(start: Check, now: Check, alpha: float) -> list[str]:
    reasons = []
    for name, measure in SHARES.items():
        before, after = mean_of(start, measure) or 0.0, mean_of(now, measure) or 0.0
        if after - before > RUNAWAY_SHARE and changed(start, now, measure, alpha) > 0:
            reasons.append(f"{name} {before:.2f} -> {after:.2f}")
    before, after = fmean(row.reply_tokens for row in start), fmean(row.reply_tokens for row in now)
    ran_away = after > RUNAWAY_LENGTH * before or after < before / RUNAWAY_LENGTH
    if ran_away and changed(start, now, lambda row: row.reply_tokens, alpha):
        reasons.append(f"reply_tokens {before:.0f} -> {after:.0f}")
    return reasons


# --- tests of a change --------------------------------------------------------------------------------------------


def mean_of(check: Check, measure: Measure) -> float | None:
    """Return the mean of a measure over the replies that have it; None where none has."""
    values = [value for row in check if (value := measure(row)) is not None]
    return fmean(values) if values else None


def by_prompt(checks: Sequence[Check], measure: Measure) -> "NDArray[Any]":
    """Return the mean of a measure over the replies to each prompt (checks, prompts); NaN where no reply has it."""
    import numpy as np

    means = [
        [mean_of(list(replies), measure) for _, replies in groupby(check, lambda row: row.prompt)] for check in checks
    ]
    return np.array(means, dtype=float)


def changed(earlier: Check, later: Check, measure: Measure, alpha: float) -> int:
    """Return 1 if a measure has risen significantly between two checks, -1 if it has fallen, else 0.

    Args:
        earlier: The earlier check.
        later: The later check.
        measure: The measure; prompts whose replies do not have it in both checks are left out.
        alpha: Level of the one-sided paired t test over prompts.
    """
    values = by_prompt([earlier, later], measure)
    rise, fall = (p_values(sign * values, [Window(0, 1)])[0] for sign in (1, -1))
    return int(rise <= alpha) - int(fall <= alpha)


def p_values(values: "NDArray[Any]", windows: Sequence[Window]) -> "NDArray[Any]":
    """Return the p-value of a rise since each window, by a paired t test over prompts; 1 where there is no rise.

    Args:
        values: The values of each check (checks, prompts); NaN where there is none.
        windows: The earlier windows, each compared with as many last checks.
    """
    import numpy as np
    from scipy.special import stdtr

    seen = np.pad(np.cumsum(~np.isnan(values), axis=0), ((1, 0), (0, 0)))
    sums = np.pad(np.cumsum(np.nan_to_num(values), axis=0), ((1, 0), (0, 0)))
    start, width = np.array(windows).T
    last = len(values) - width
    with np.errstate(invalid="ignore", divide="ignore"):
        before, now = ((sums[at + width] - sums[at]) / (seen[at + width] - seen[at]) for at in (start, last))
        change = now - before  # (windows, prompts)
        count = (~np.isnan(change)).sum(axis=1)
        mean = np.nansum(change, axis=1) / count
        error = np.sqrt(np.nansum((change - mean[:, None]) ** 2, axis=1) / (count - 1) / count)
        rises = (count > 1) & (mean > ROUNDING * max(1.0, float(np.nanmax(np.abs(values), initial=0.0))))
        p: NDArray[Any] = np.where(rises, stdtr(count - 1, -mean / error), 1.0)
    return p
