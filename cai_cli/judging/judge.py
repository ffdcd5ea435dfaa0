"""A feedback model that judges which of two replies is better under a principle (paper section 4.1)."""

import math
from collections.abc import Sequence

from cai_cli.engines.base import RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison
from cai_cli.judging.methods import METHODS


class Judge(FeedbackModel):
    """A feedback model that judges by its method."""

    def judge(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        """Return one judgement for each comparison, in order; a failure never counts as a vote."""
        return [_checked(answer) for answer in METHODS[self.method](self, comparisons)]


def _checked(answer: Judgement | RequestFailure) -> Judgement | RequestFailure:
    """Return the judgement; one whose probability is NaN becomes a failure, because it has no winner."""
    if isinstance(answer, Judgement) and math.isnan(answer.p_first):
        return RequestFailure("the judge's log-probabilities are not numbers")
    return answer
