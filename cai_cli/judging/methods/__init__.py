"""Judging methods: how a model compares two replies under a principle (paper section 4.1).

To add one, write a module with a function of type `JudgingMethod` and register it here, in `Method` and `METHODS`.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from cai_cli.engines.base import RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison
from cai_cli.judging.methods.choice import choice
from cai_cli.judging.methods.contrast import contrast
from cai_cli.judging.methods.cot import cot
from cai_cli.judging.methods.verdict import verdict

# Returns one judgement for each comparison, in order; a failure where the model gave no answer.
JudgingMethod = Callable[[FeedbackModel, Sequence[PairComparison]], list[Judgement | RequestFailure]]


class Method(StrEnum):
    """How a judge compares two replies."""

    CHOICE = "choice"
    COT = "cot"
    CONTRAST = "contrast"
    VERDICT = "verdict"


METHODS: Mapping[str, JudgingMethod] = {
    Method.CHOICE: choice,
    Method.COT: cot,
    Method.CONTRAST: contrast,
    Method.VERDICT: verdict,
}
