"""Votes on a pair of replies, and their aggregation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair, Vote
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.judge import Judge, Judgement, Order, PairComparison
from cai_cli.judging.vote_cache import RecordedVotes

Answers = Sequence[tuple[PairComparison, Judgement | RequestFailure]]


@dataclass(frozen=True)
class Labeller:
    """A judge, the principles it draws from and how often it is asked."""

    judge: Judge
    principles: Sequence[PreferencePrinciple]
    per_pair: int
    orders: tuple[Order, ...]
    samples: int = 1
    min_confidence: float = 0.5
    recorded: RecordedVotes | None = None

    def judge_all(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        """One judgement per comparison, in order; what is recorded is not asked."""
        known = [self.recorded.judgement(one) if self.recorded else None for one in comparisons]
        answers = iter(self.judge.judge([one for one, said in zip(comparisons, known, strict=True) if said is None]))
        return [next(answers) if said is None else self.judge.clamped(said) for said in known]

    def comparisons(self, pair: Pair) -> Iterator[PairComparison]:
        """All that is asked about one pair. The principles drawn for it depend on the seed and the pair alone."""
        drawn = sorted(self.principles, key=lambda p: seed_for(self.judge.seed, "comparison", pair.id, p.id))
        for principle in drawn[: self.per_pair]:
            for order in self.orders:
                for sample in range(self.samples):
                    yield PairComparison(pair, principle, order, sample)


@dataclass(frozen=True)
class PairVerdict:
    """A judge's opinion of one pair: the mean probability that `a` is the better reply, and the votes behind it."""

    p_a: float
    votes: Sequence[tuple[PairComparison, Judgement]]

    def as_rows(self, method: str) -> list[Vote]:
        """The votes as a row holds them, "ab" where `a` stood first."""
        return [
            Vote(
                principle_id=c.principle.id,
                method=method,
                order=c.order,
                p_first=judgement.p_first,
                rationale=judgement.rationale,
            )
            for c, judgement in self.votes
        ]


def aggregate_votes(pairs: Sequence[Pair], labeller: Labeller) -> list[PairVerdict | RequestFailure]:
    """One opinion per pair, in order; a Refusal where no principle was answered in all its orders."""
    asked = [list(labeller.comparisons(pair)) for pair in pairs]
    answers = iter(labeller.judge_all([comparison for group in asked for comparison in group]))
    return [_aggregated([(c, next(answers)) for c in group], labeller) for group in asked]


def _aggregated(answers: Answers, labeller: Labeller) -> PairVerdict | RequestFailure:
    votes: list[tuple[PairComparison, Judgement]] = []
    shares = []
    for start in range(0, len(answers), len(labeller.orders) * labeller.samples):
        one_principle = answers[start : start + len(labeller.orders) * labeller.samples]
        answered = [(c, judgement) for c, judgement in one_principle if isinstance(judgement, Judgement)]
        of_orders = [[_p_a(c, j) for c, j in answered if c.order == order] for order in labeller.orders]
        if all(of_orders):
            votes += answered
            shares.append(math.fsum(math.fsum(p) / len(p) for p in of_orders) / len(of_orders))
    if not shares:
        return next(judgement for _, judgement in answers if isinstance(judgement, RequestFailure))
    return PairVerdict(math.fsum(shares) / len(shares), votes)


def _p_a(comparison: PairComparison, judgement: Judgement) -> float:
    return judgement.p_first if comparison.order == "ab" else 1 - judgement.p_first
