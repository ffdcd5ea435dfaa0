"""Contrast: the log-probability of a reply under "follow the principle" less that under "break the principle".

Departure: this method is not in the paper (after RLCD, arXiv 2307.12950). It is for judges that are too small for
multiple choice.
"""

from collections.abc import Sequence

from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison, sigmoid
from cai_cli.prompting.comparison import contrast_requests


def contrast(judge: FeedbackModel, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
    """Return one judgement for each comparison, in order. No few-shot examples are used."""
    requests = [
        LogprobRequest(prompt.text, c.ordered_replies, prompt.prefill, c.pair.key)
        for c in comparisons
        for prompt in contrast_requests(c.pair.prompt, c.principle, judge.prompt_format)
    ]
    logprobs = judge.engine.option_logprobs(requests)
    return [_contrast(*both) for both in zip(logprobs[::2], logprobs[1::2], strict=True)]


def _contrast(
    following: list[float] | RequestFailure, breaking: list[float] | RequestFailure
) -> Judgement | RequestFailure:
    if isinstance(following, RequestFailure):
        return following
    if isinstance(breaking, RequestFailure):
        return breaking
    first, second = (f - b for f, b in zip(following, breaking, strict=True))
    return Judgement(sigmoid(first - second))
