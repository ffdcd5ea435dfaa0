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
        return [self.clamped(answer) for answer in METHODS[self.method](self, comparisons)]

    def clamped(self, answer: Judgement | RequestFailure) -> Judgement | RequestFailure:
        """Return a judgement within the limits of `clamp`; a probability that is NaN becomes a failure."""
        if isinstance(answer, RequestFailure):
            return answer
        if math.isnan(answer.p_first):  # comparing it is always false, so it would become the lower limit
            return RequestFailure("the judge's log-probabilities are not numbers")
        low, high = self.clamp
        return Judgement(min(high, max(low, answer.p_first)), answer.rationale)
