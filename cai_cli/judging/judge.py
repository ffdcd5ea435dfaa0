"""A feedback model that judges which of two replies is better under a principle (paper section 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure, Sampling
from cai_cli.judging.base import Judgement, PairComparison
from cai_cli.judging.methods import METHODS
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import OPTIONS, comparison_request


@dataclass
class Judge:
    """A feedback model and the settings it judges with.

    Attributes:
        engine: The model.
        method: Name of the judging method, a key of `METHODS`.
        examples: Few-shot examples.
        prompt_format: How prompts are built.
        seed: Random seed of the run.
        sampling: Sampling of rationales and verdicts.
        clamp: Smallest and largest probability of a judgement.
        calibrate: Whether `choice` subtracts the judge's A/B bias.
    """

    engine: Engine
    method: str
    examples: Sequence[ComparisonExample]
    prompt_format: PromptFormat
    seed: int
    sampling: Sampling
    clamp: tuple[float, float] = (0.0, 1.0)
    calibrate: bool = False
    letter_bias: dict[str, float] = field(default_factory=dict)  # principle id -> log-odds; `choice` fills it

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

    def multiple_choice(self, pair: Pair, principle: PreferencePrinciple, replies: tuple[str, str]) -> LogprobRequest:
        """Return the request for the log-probabilities of the letters A and B as the answer."""
        request = comparison_request(pair.prompt, principle.comparison, replies, self.examples, self.prompt_format)
        return LogprobRequest(request.text, OPTIONS, request.prefill, pair.key)
