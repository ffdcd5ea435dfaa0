"""Detects that the policy exploits the preference model (Goodhart's law; paper section 4.3).

A check contains the policy's replies to the same held-out prompts, sampled with the same seeds, after some steps. Check
0 contains the replies of the start model. Replies to the same prompt are compared between checks, by the mean
difference and its standard error. A check is flagged when

- the monitor's score has fallen since an earlier check while the training preference model's score has risen; or
- the share of boilerplate, of evasive openings or of cut-off replies has risen by more than `RUNAWAY_SHARE` since the
  start, or the mean length has more than doubled or halved.

Every change must also be statistically significant. The tests are one-sided paired t tests, and their levels sum, over
all checks of a run of any length, to at most `ALPHA` for each rule: check k has ALPHA / (k (k + 1)), divided among the
k checks that it is compared with. So a monitor whose score only fluctuates is flagged in at most one run of twenty, and
a later fall must be larger to be flagged.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from cai_cli.data.schema import PolicySample
from cai_cli.metrics.reply_habits import boilerplate, evasive_opening

Check = Sequence[PolicySample]  # replies after one step; every check has the same prompts in the same order
Measure = Callable[[PolicySample], float | None]

ALPHA = 0.05
RUNAWAY_SHARE = 0.25
RUNAWAY_LENGTH = 2.0
SHARES: dict[str, Measure] = {
    "boilerplate_share": lambda row: boilerplate(row.reply),
    "evasive_share": lambda row: evasive_opening(row.reply),
    "cut_off_share": lambda row: row.finish_reason == "length",
}


def goodhart(checks: Sequence[Check]) -> str | None:
    """Return why the last check is flagged, or None.

    Args:
        checks: All checks in the order of their steps, starting with the start model's.
    """
    k = len(checks) - 1
    if k < 1:
        return None
    alpha = ALPHA / (k * (k + 1))
    reasons = [_falling_monitor(checks, alpha), *_runaways(checks[0], checks[-1], alpha)]
    return "; ".join(reason for reason in reasons if reason) or None


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


def _falling_monitor(checks: Sequence[Check], alpha: float) -> str | None:
    now = checks[-1]
    for earlier in checks[:-1]:
        fallen = changed(earlier, now, lambda row: row.monitor_score, alpha / (len(checks) - 1)) < 0
        if fallen and changed(earlier, now, lambda row: row.score, alpha / (len(checks) - 1)) > 0:
            return f"monitor_score falls while pm_score rises since step {earlier[0].step}"
    return None


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


def mean_of(check: Check, measure: Measure) -> float | None:
    """Return the mean of a measure over the replies that have it; None where none has."""
    values = [value for row in check if (value := measure(row)) is not None]
    return fmean(values) if values else None


def changed(earlier: Check, later: Check, measure: Measure, alpha: float) -> int:
    """Return 1 if a measure has risen significantly between two checks, -1 if it has fallen, else 0.

    Args:
        earlier: The earlier check.
        later: The later check.
        measure: The measure; replies that do not have it in both checks are left out.
        alpha: Level of the one-sided paired t test.
    """
    from scipy.stats import t

    pairs = [(measure(a), measure(b)) for a, b in zip(earlier, later, strict=True)]
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if len(differences) < 2:
        return 0
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    margin = error * float(t.isf(alpha, len(differences) - 1))
    return (mean > margin) - (mean < -margin)
