"""The unit of the reward of `cai rl`, in which `--beta` and `--cutoff-penalty` are measured.

The unit is the standard deviation of the start model's scores within a prompt. Differences between prompts are left
out, because they cancel in the advantage, which compares replies to the same prompt. So two preference models whose
scores differ only by a constant for each prompt have the same unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import PolicySample

MIN_COMPARISONS = 16  # replies of a check beyond the first to each prompt, which measure the spread within a prompt
ROUNDING = 1e-5  # scores that differ by less, relative to their size, are equal up to float32 rounding


def replies_per_prompt(prompts: int) -> int:
    """The replies that a check samples to each held-out prompt: two or more, and more where there are few prompts."""
    return 1 + -(-MIN_COMPARISONS // max(1, prompts))


@dataclass(frozen=True)
class RewardNormalizer:
    """Standardises scores by those of the start model's replies to the held-out prompts.

    Attributes:
        mean: Mean score of those replies, as a logit.
        std: Standard deviation of their scores within a prompt, pooled over the prompts.
    """

    mean: float
    std: float

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std


def reward_normalizer(rows: Sequence[PolicySample]) -> RewardNormalizer:
    """The normalizer that the start model's replies determine.

    Args:
        rows: The replies, those to the same prompt in succession, two or more to each.

    Raises:
        CaiError: The replies to each prompt have the same score (`cannot-distinguish`).
    """
    scores = [[row.score for row in replies] for _, replies in groupby(rows, key=lambda row: row.prompt)]
    everything = [score for of_prompt in scores for score in of_prompt]
    squares = [(score - fmean(of_prompt)) ** 2 for of_prompt in scores for score in of_prompt]
    spread = math.sqrt(math.fsum(squares) / (len(everything) - len(scores)))
    if spread <= ROUNDING * max(1.0, *map(abs, everything)):
        raise CaiError(
            f"rl: the preference model cannot tell the start model's replies to the same prompt apart: of "
            f"{len(everything)} held-out replies, those to each prompt have the same score",
            hint="use more --held-out prompts or a higher --temperature, or train the preference model longer",
            code="cannot-distinguish",
        )
    return RewardNormalizer(fmean(everything), spread)
