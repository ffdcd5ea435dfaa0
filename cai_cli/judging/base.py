"""Shared by all judging methods: the feedback model, a comparison to judge, the judgement, and probabilities from
log-probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure, Sampling
from cai_cli.prompting.arrangements import arrangements
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import OPTIONS, comparison_request

Order = Literal["ab", "ba"]


@dataclass(frozen=True)
class PairComparison:
    """One judgement to make.

    Attributes:
        pair: The two replies to compare.
        principle: The principle to compare them by.
        order: Which reply comes first: "ab", or "ba" for the second one.
        sample: Number of this rationale, where several are sampled for the same comparison.
    """

    pair: Pair
    principle: PreferencePrinciple
    order: Order
    sample: int = 0

    @property
    def ordered_replies(self) -> tuple[str, str]:
        """The texts of the two replies, in `order`."""
        a, b = self.pair.a[0].content, self.pair.b[0].content
        return (a, b) if self.order == "ab" else (b, a)

    def seed(self, seed: int) -> int:
        """Return the seed of this judgement's randomness, derived from the seed of the run."""
        return seed_for(seed, "judgement", self.pair.id, self.principle.id, self.order, self.sample)


@dataclass(frozen=True)
class Judgement:
    """A judge's answer.

    Attributes:
        p_first: Probability that the reply in first position is the better one.
        rationale: The chain of thought before the answer, where there is one.
    """

    p_first: float
    rationale: str | None = None


@dataclass
class FeedbackModel:
    """A feedback model and the settings it judges with.

    Attributes:
        engine: The model.
        method: Name of the judging method, a key of `METHODS`.
        examples: Few-shot examples.
        prompt_format: How prompts are built.
        seed: Random seed of the run.
        sampling: Sampling of rationales and verdicts.
        clamp: Smallest and largest probability of a label; `aggregate_votes` applies it to the mean of the judgements.
        calibrate: Whether `choice` subtracts the judge's A/B bias.
        principles: Principles to draw from for few-shot examples without a question.
    """

    engine: Engine
    method: str
    examples: Sequence[ComparisonExample]
    prompt_format: PromptFormat
    seed: int
    sampling: Sampling
    clamp: tuple[float, float] = (0.0, 1.0)
    calibrate: bool = False
    principles: Sequence[PreferencePrinciple] = ()
    # (principle id, arrangement) -> log-odds; `choice` fills it
    letter_bias: dict[tuple[str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arrangements = arrangements(self.examples, self.principles, self.seed)

    def arrangement(self, pair: Pair) -> int:
        """Which arrangement of the examples a pair is judged with, in both orders."""
        return seed_for(self.seed, "examples", pair.id) % len(self.arrangements)

    def examples_for(self, pair: Pair) -> Sequence[ComparisonExample]:
        """Return the few-shot examples that a pair is judged with, arranged."""
        return self.arrangements[self.arrangement(pair)]

    def multiple_choice(
        self, pair: Pair, principle: PreferencePrinciple, replies: tuple[str, str], arrangement: int | None = None
    ) -> LogprobRequest:
        """Return the request for the log-probabilities of the letters A and B as the answer."""
        examples = self.examples_for(pair) if arrangement is None else self.arrangements[arrangement]
        request = comparison_request(pair.prompt, principle.comparison, replies, examples, self.prompt_format)
        return LogprobRequest(request.text, OPTIONS, request.prefill, pair.key)


def sigmoid(log_odds: float) -> float:
    """Return the probability of the first of two options (paper section 4.1).

    Args:
        log_odds: Difference of the options' natural log-probabilities.

    Examples:
        >>> sigmoid(0.0), round(sigmoid(2.0), 3)
        (0.5, 0.881)
    """
    return 1 / (1 + math.exp(-max(log_odds, -700.0)))


def normalised(
    logprobs: list[float] | RequestFailure, rationale: str | None = None, *, bias: float = 0.0
) -> Judgement | RequestFailure:
    """Return the judgement that two log-probabilities (natural logs) express.

    Args:
        logprobs: Log-probabilities of the options, the first reply first.
        rationale: Passed on to the judgement.
        bias: Log-odds of the first option to subtract.
    """
    if isinstance(logprobs, RequestFailure):
        return logprobs
    return Judgement(sigmoid(logprobs[0] - logprobs[1] - bias), rationale)
