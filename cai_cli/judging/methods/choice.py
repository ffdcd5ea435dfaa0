"""Multiple choice: the normalised log-probabilities of the letters A and B (the paper's first method, section 4.1).

Departure: with `calibrate`, the judge's A/B bias is subtracted. It is estimated on content-free pairs (Zhao et al.
2021, arXiv 2102.09690): with two identical replies that contain nothing, any preference for a letter is bias.
"""

import math
from collections.abc import Mapping, Sequence

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Pair
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison, normalised
from cai_cli.prompting.base import user

CONTENT_FREE = ("N/A", "[MASK]", "")


def choice(judge: FeedbackModel, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
    """Return one judgement for each comparison, in order.

    Raises:
        CaiError: The A/B bias could not be estimated.
    """
    bias = estimate_letter_bias(judge, comparisons) if judge.calibrate else {}
    requests = [judge.multiple_choice(c.pair, c.principle, c.ordered_replies) for c in comparisons]
    return [
        normalised(logprobs, bias=bias.get((c.principle.id, judge.arrangement(c.pair)), 0.0))
        for c, logprobs in zip(comparisons, judge.engine.option_logprobs(requests), strict=True)
    ]


def estimate_letter_bias(
    judge: FeedbackModel, comparisons: Sequence[PairComparison]
) -> Mapping[tuple[str, int], float]:
    """Return the mean log-odds of the letter A over content-free pairs, by principle id and arrangement of examples."""
    needed = {(c.principle.id, judge.arrangement(c.pair)): c.principle for c in comparisons}
    new = {key: principle for key, principle in needed.items() if key not in judge.letter_bias}
    blank = Pair(id="blank", prompt=[user("N/A")], a=[], b=[], human=None, source=None)
    requests = [
        judge.multiple_choice(blank, principle, (text, text), arrangement)
        for (_, arrangement), principle in new.items()
        for text in CONTENT_FREE
    ]
    answers = iter(judge.engine.option_logprobs(requests))
    for key in new:
        log_odds = []
        for _ in CONTENT_FREE:
            answer = next(answers)
            if isinstance(answer, RequestFailure):
                raise CaiError(
                    f"--calibrate: the judge did not answer a content-free pair under {key[0]!r}: {answer.reason}",
                    code="request-failed",
                )
            log_odds.append(answer[0] - answer[1])
        judge.letter_bias[key] = math.fsum(log_odds) / len(log_odds)
    return judge.letter_bias
