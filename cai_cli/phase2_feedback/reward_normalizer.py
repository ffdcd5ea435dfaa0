"""The unit of the reward of `cai rl`, in which `--beta` and `--cutoff-penalty` are measured.

The unit is the standard deviation of the start model's scores within a prompt. Differences between prompts are left
out, because they cancel in the advantage, which compares replies to the same prompt. So two preference models whose
scores differ only by a constant for each prompt have the same unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import PolicySample

MIN_COMPARISONS = 16  # replies of a check beyond the first to each prompt, which measure the spread within a prompt
NO_SIGNAL = 0.01  # nats; a judge whose log-odds differ by less within a prompt does not tell replies apart
ROUNDING = 1e-5  # scores that differ by less, relative to their size, are equal up to float32 rounding


Measure = Callable[[PolicySample], float | None]


def replies_per_prompt(prompts: int) -> int:
    """The replies that a check samples to each held-out prompt: two or more, and more where there are few prompts."""
    return 1 + -(-MIN_COMPARISONS // max(1, prompts))


@dataclass(frozen=True)
class RewardNormalizer:
    """Standardises scores by those of the start model's replies to the held-out prompts.

    Attributes:
        mean: Mean score of those replies, as a logit.
        std: Standard deviation of their scores within a prompt, pooled over the prompts; 1 where a judge's is about 0.
        spread: That standard deviation.
    """

    mean: float
    std: float
    spread: float

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std


def spread_of(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation of scores within their groups, pooled over the groups; None without two in a group."""
    squares = [(score - fmean(group)) ** 2 for group in groups for score in group]
    freedom = sum(len(group) - 1 for group in groups if group)
    return math.sqrt(math.fsum(squares) / freedom) if freedom else None


def _by_prompt(rows: Sequence[PolicySample], measure: Measure) -> list[list[float]]:
    return [
        [score for row in replies if (score := measure(row)) is not None]
        for _, replies in groupby(rows, key=lambda row: row.prompt)
    ]


def judge_normalizer(rows: Sequence[PolicySample], measure: Measure) -> RewardNormalizer:
    """The normalizer of a judge's log-odds, as `reward_normalizer` does it.

    A judge that does not tell the replies to a prompt apart keeps its unit of nats (`std` is 1): standardised, rounding
    would be a reward.

    Raises:
        CaiError: No reply has a score (`request-failed`).
    """
    scores = _by_prompt(rows, measure)
    everything = [score for of_prompt in scores for score in of_prompt]
    if not everything:
        raise CaiError(
            f"rl: the judge refused requests about each of the {len(rows)} held-out replies, so that none has a reward",
            hint="use another judge, or fewer principles; run the same command again to repeat the failed requests",
            code="request-failed",
        )
    spread = spread_of(scores) or 0.0
    return RewardNormalizer(fmean(everything), spread if spread > NO_SIGNAL else 1.0, spread)


def silent_judge(normalizers: Mapping[str, RewardNormalizer]) -> str | None:
    """A warning where the judge's rewards do not depend on the reply, else None."""
    judge = normalizers.get("judge")
    if judge is None or judge.spread > NO_SIGNAL:
        return None
    return (
        f"rl: the judge gives no reward signal: its scores of the start model's replies to one prompt have a "
        f"standard deviation of {judge.spread:.4f} nats; "
        "its answers depend on the phrasing or the order, not on the reply"
    )


def reward_normalizer(rows: Sequence[PolicySample], measure: Measure = lambda row: row.score) -> RewardNormalizer:
    """The normalizer that the start model's replies determine.

    Args:
        rows: The replies, those to the same prompt in succession, two or more to each.
        measure: The score of a reply.

    Raises:
        CaiError: The replies to each prompt have the same score (`cannot-distinguish`).
    """
    scores = _by_prompt(rows, measure)
    everything = [score for of_prompt in scores for score in of_prompt]
    spread = spread_of(scores) or 0.0
    if spread <= ROUNDING * max(1.0, *map(abs, everything)):
        raise CaiError(
            f"rl: the preference model cannot tell the start model's replies to the same prompt apart: of "
            f"{len(everything)} held-out replies, those to each prompt have the same score",
            hint="use more --held-out prompts or a higher --temperature, or train the preference model longer",
            code="cannot-distinguish",
        )
    return RewardNormalizer(fmean(everything), spread, spread)
