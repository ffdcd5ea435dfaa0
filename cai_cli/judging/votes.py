"""Votes on a pair of replies, and their mean (paper section 4.1).

A vote is the judge's probability as it is. The limits of `--clamp` apply to the mean of all votes on a pair. Clamping
each vote before averaging would discard the preference of a judge with a position bias: its probabilities of 0.95 and
0.70 for the first reply in the two orders would both become 0.6, and the pair a tie.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair, Vote
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.base import Judgement, Order, PairComparison
from cai_cli.judging.judge import Judge
from cai_cli.judging.vote_cache import RecordedVotes

Answers = Sequence[tuple[PairComparison, Judgement | RequestFailure]]


@dataclass(frozen=True)
class Labeller:
    """A judge, the principles it draws from, and how many judgements it makes of each pair.

    Attributes:
        judge: The feedback model.
        principles: Principles to draw from.
        per_pair: Number of principles drawn for each pair.
        orders: Orders in which the replies are presented.
        samples: Number of rationales for each comparison.
        min_confidence: Smallest p_chosen of a label.
        recorded: Votes of an earlier labelling, which are reused.
    """

    judge: Judge
    principles: Sequence[PreferencePrinciple]
    per_pair: int
    orders: tuple[Order, ...]
    samples: int = 1
    min_confidence: float = 0.5
    recorded: RecordedVotes | None = None

    @property
    def votes_per_pair(self) -> int:
        """Number of comparisons of each pair."""
        return self.per_pair * len(self.orders) * self.samples

    def judge_all(self, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
        """Return one judgement for each comparison, in order; the judge is called only where none is recorded."""
        recorded = [self.recorded.judgement(c) if self.recorded else None for c in comparisons]
        missing = [c for c, judgement in zip(comparisons, recorded, strict=True) if judgement is None]
        answers = iter(self.judge.judge(missing))
        return [next(answers) if judgement is None else judgement for judgement in recorded]

    def comparisons(self, pair: Pair) -> Iterator[PairComparison]:
        """Yield every comparison to make of a pair; its principles depend only on the seed and the pair."""
        drawn = sorted(self.principles, key=lambda p: seed_for(self.judge.seed, "comparison", pair.id, p.id))
        for principle in drawn[: self.per_pair]:
            for order in self.orders:
                for sample in range(self.samples):
                    yield PairComparison(pair, principle, order, sample)


@dataclass(frozen=True)
class PairVerdict:
    """The result of judging one pair.

    Attributes:
        p_a: Mean probability that `a` is the better reply, within the judge's limits.
        votes: The judgements behind it.
    """

    p_a: float
    votes: Sequence[tuple[PairComparison, Judgement]]

    def as_rows(self, method: str) -> list[Vote]:
        """Return the votes as a row stores them: order "ab" where `a` was in first position."""
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
    """Return one verdict for each pair, in order.

    A principle counts only where every order was answered, so that position bias cancels.

    Args:
        pairs: The pairs to judge.
        labeller: The judge and its settings.

    Returns:
        The mean over principles of the mean over orders of the mean over rationales, then clamped; the first failure
        where no principle counts.
    """
    groups = [list(labeller.comparisons(pair)) for pair in pairs]
    answers = iter(labeller.judge_all([comparison for group in groups for comparison in group]))
    return [_verdict([(c, next(answers)) for c in group], labeller) for group in groups]


def _verdict(answers: Answers, labeller: Labeller) -> PairVerdict | RequestFailure:
    votes: list[tuple[PairComparison, Judgement]] = []
    means = []
    for start in range(0, len(answers), len(labeller.orders) * labeller.samples):
        one_principle = answers[start : start + len(labeller.orders) * labeller.samples]
        answered = [(c, judgement) for c, judgement in one_principle if isinstance(judgement, Judgement)]
        by_order = [[_p_a(c, j) for c, j in answered if c.order == order] for order in labeller.orders]
        if all(by_order):
            votes += answered
            means.append(math.fsum(math.fsum(p) / len(p) for p in by_order) / len(by_order))
    if not means:
        return next(judgement for _, judgement in answers if isinstance(judgement, RequestFailure))
    return PairVerdict(_clamped(math.fsum(means) / len(means), labeller.judge.clamp), votes)


def _clamped(p_a: float, limits: tuple[float, float]) -> float:
    """Return `p_a` such that it and 1 - `p_a` lie within the limits: which reply is `a` says nothing about it."""
    low, high = max(limits[0], 1 - limits[1]), min(limits[1], 1 - limits[0])
    return min(high, max(low, p_a))


def _p_a(comparison: PairComparison, judgement: Judgement) -> float:
    return judgement.p_first if comparison.order == "ab" else 1 - judgement.p_first
