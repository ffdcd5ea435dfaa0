"""How a model compares two replies under a principle (paper section 4.1): four methods, one judgement each time.

choice    log-probabilities of the letters of a multiple-choice question, normalised (the paper's first method)
cot       the model thinks step by step first; the probability is clamped (the paper's second method)
contrast  log-probability of each reply when spoken by an assistant that follows the principle, less that of one that
          breaks it; not in the paper (after RLCD, arXiv 2307.12950), for judges too small for multiple choice
verdict   a letter in words, for engines without log-probabilities
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.prompting.base import PromptFormat, user
from cai_cli.prompting.comparison import (
    OPTIONS,
    answer_after,
    comparison_request,
    contrast_requests,
    rationale_request,
    verdict_of,
    verdict_request,
)

Order = Literal["ab", "ba"]
# Replies that say nothing (Zhao et al. 2021, arXiv 2102.09690): the answer to them is the judge's liking for a letter.
CONTENT_FREE = ("N/A", "[MASK]", "")


class Method(StrEnum):
    """How a judge compares two replies."""

    CHOICE = "choice"
    COT = "cot"
    CONTRAST = "contrast"
    VERDICT = "verdict"


@dataclass(frozen=True)
class PairComparison:
    """One judgement that is wanted: of `pair` under `principle`, shown in `order` ("ba": the second reply first).
    `sample` numbers the rationales of one comparison."""

    pair: Pair
    principle: PreferencePrinciple
    order: Order
    sample: int = 0

    @property
    def shown(self) -> tuple[str, str]:
        """The replies in the order they are shown."""
        a, b = self.pair.a[0].content, self.pair.b[0].content
        return (a, b) if self.order == "ab" else (b, a)

    def seed(self, seed: int) -> int:
        return seed_for(seed, "judgement", self.pair.id, self.principle.id, self.order, self.sample)


@dataclass(frozen=True)
class Judgement:
    """The probability that the reply shown first is the better one, and the thoughts that led to it."""

    p_first: float
    rationale: str | None = None


@dataclass
class Judge:
    """A feedback model and how it is asked. `clamp`: limits of every probability. `sampling`: of thoughts and words."""

    engine: Engine
    method: str
    examples: Sequence[ComparisonExample]
    form: PromptFormat
    seed: int
    sampling: Sampling
    clamp: tuple[float, float] = (0.0, 1.0)
    calibrate: bool = False
    _priors: dict[str, float] = field(default_factory=dict)

    def judge(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        """One judgement per comparison, in order. A Refusal is no vote, and never stands for one."""
        methods: dict[str, Callable[[Sequence[PairComparison]], list[Judgement | RequestFailure]]] = {
            "choice": self._choice,
            "cot": self._cot,
            "contrast": self._contrast,
            "verdict": self._verdict,
        }
        return [self.clamped(answer) for answer in methods[self.method](comparisons)]

    def clamped(self, answer: Judgement | RequestFailure) -> Judgement | RequestFailure:
        """Within the limits. A probability that is no number becomes a Refusal."""
        if isinstance(answer, RequestFailure):
            return answer
        if math.isnan(answer.p_first):  # a comparison with it is false: it would become the lower limit
            return RequestFailure("the judge's log-probabilities are no numbers")
        low, high = self.clamp
        return Judgement(min(high, max(low, answer.p_first)), answer.rationale)

    # --- the paper's methods ----------------------------------------------------------------------------------

    def _choice(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        priors = self._letter_priors([c.principle for c in comparisons]) if self.calibrate else {}
        answers = self.engine.option_logprobs([self._question(c.pair, c.principle, c.shown) for c in comparisons])
        return [
            _normalised(answer, prior=priors.get(c.principle.id, 0.0))
            for c, answer in zip(comparisons, answers, strict=True)
        ]

    def _question(self, pair: Pair, principle: PreferencePrinciple, shown: tuple[str, str]) -> LogprobRequest:
        request = comparison_request(pair.prompt, principle.comparison, shown, self.examples, self.form)
        return LogprobRequest(request.text, OPTIONS, request.prefill, pair.key)

    def _letter_priors(self, principles: Sequence[PreferencePrinciple]) -> dict[str, float]:
        """Principle id -> log-odds of the first letter where both replies say nothing. Raises CaiError."""
        new = {p.id: p for p in principles if p.id not in self._priors}
        blank = Pair(id="blank", prompt=[user("N/A")], a=[], b=[], human=None, source=None)
        questions = [self._question(blank, p, (text, text)) for p in new.values() for text in CONTENT_FREE]
        answers = iter(self.engine.option_logprobs(questions))
        for name in new:
            odds = []
            for _ in CONTENT_FREE:
                answer = next(answers)
                if isinstance(answer, RequestFailure):
                    raise CaiError(f"--calibrate: no answer to a content-free pair under {name!r}: {answer.reason}")
                odds.append(answer[0] - answer[1])
            self._priors[name] = math.fsum(odds) / len(odds)
        return self._priors

    def _cot(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        requests = [
            rationale_request(c.pair.prompt, c.principle.comparison, c.shown, self.examples, self.form)
            for c in comparisons
        ]
        asks = [
            GenerationRequest(r.text, c.seed(self.seed), r.prefill, r.stop, c.pair.key)
            for c, r in zip(comparisons, requests, strict=True)
        ]
        thoughts = self.engine.generate(asks, self.sampling)
        judgements: list[Judgement | RequestFailure] = []
        questions = []
        for c, request, thought in zip(comparisons, requests, thoughts, strict=True):
            if isinstance(thought, RequestFailure) or not thought.text.strip():
                judgements.append(thought if isinstance(thought, RequestFailure) else RequestFailure("empty rationale"))
                continue
            text = thought.text.rstrip()
            answer = answer_after(text, request, self.form)
            judgements.append(Judgement(0.5, text.strip()))
            questions.append(LogprobRequest(answer.text, OPTIONS, answer.prefill, c.pair.key))
        scores = iter(self.engine.option_logprobs(questions))
        return [j if isinstance(j, RequestFailure) else _normalised(next(scores), j.rationale) for j in judgements]

    # --- departures -------------------------------------------------------------------------------------------

    def _contrast(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        questions = [
            LogprobRequest(request.text, c.shown, request.prefill, c.pair.key)
            for c in comparisons
            for request in contrast_requests(c.pair.prompt, c.principle, self.form)
        ]
        answers = self.engine.option_logprobs(questions)
        judgements: list[Judgement | RequestFailure] = []
        for following, breaking in zip(answers[::2], answers[1::2], strict=True):
            if isinstance(following, RequestFailure) or isinstance(breaking, RequestFailure):
                judgements.append(following if isinstance(following, RequestFailure) else breaking)  # type: ignore[arg-type]
                continue
            first, second = (f - b for f, b in zip(following, breaking, strict=True))
            judgements.append(Judgement(sigmoid(first - second)))
        return judgements

    def _verdict(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        asks = []
        for c in comparisons:
            r = verdict_request(c.pair.prompt, c.principle.comparison, c.shown, self.examples, self.form)
            asks.append(GenerationRequest(r.text, c.seed(self.seed), r.prefill, r.stop, c.pair.key))
        judgements: list[Judgement | RequestFailure] = []
        for reply in self.engine.generate(asks, self.sampling):
            if isinstance(reply, RequestFailure):
                judgements.append(reply)
                continue
            letter = verdict_of(reply.text)
            judgements.append(
                Judgement(float(letter == OPTIONS[0])) if letter else RequestFailure("no verdict in the answer")
            )
        return judgements


def _normalised(
    answer: list[float] | RequestFailure, rationale: str | None = None, *, prior: float = 0.0
) -> Judgement | RequestFailure:
    if isinstance(answer, RequestFailure):
        return answer
    return Judgement(sigmoid(answer[0] - answer[1] - prior), rationale)


def sigmoid(log_odds: float) -> float:
    """The probability of the first of two options from the difference of their natural log-probabilities: their
    normalised probability (paper section 4.1)."""
    return 1 / (1 + math.exp(-max(log_odds, -700.0)))
