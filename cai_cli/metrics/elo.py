"""Win rates and Elo ratings of models from pairwise comparisons (paper section 4.3, figures 2 and 8).

On the paper's Elo scale a difference of D means a win rate of 1 / (1 + 10^(-D / 400)). Departure: the ratings are those
of the Bradley-Terry model (evalica), fitted to all comparisons at once, with a mean of 1,000 over the models. Updating
them game by game, as in chess, would make them depend on the order of the rows. A tie is half a win for each model, and
one tie is added to every two models, so that a model that always wins has a finite rating.

Prompts of kind red-team form the harmlessness axis and those of kind helpful the helpfulness axis; other prompts count
in the win rates only. Intervals are computed over prompts, because comparisons on one prompt depend on each other.

Several models give many win rates, and of many intervals for models that are alike some exclude one half by chance. All
win rates of a result are therefore simultaneous: in 95% of results every one of them contains its value. The ratings
are simultaneous too, and so are the mean scores. `simultaneous` in the result counts each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cai_cli.common.hash_index import KeyTable
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.schema import Kind, Rejected
from cai_cli.metrics.intervals import ClusterBootstrap, Estimate, Limits, clustered_share, widened
from cai_cli.metrics.label_audit import win_or_half

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

AXES: Mapping[str, Kind] = {"harmless": "red-team", "helpful": "helpful"}
MEAN_RATING, ELO_SCALE = 1000.0, 400.0
RATING_LIMITS: Limits = (-1000.0, 3000.0)  # odds of 100,000 to 1 in either direction
SCORE_LIMITS: Limits = (-100.0, 100.0)  # a preference model's score is a logit
UNBOUNDED: Limits = (-math.inf, math.inf)


class PairSum(NamedTuple):
    """A sum over the comparisons of models `i` < `j`, by their places in `Tournament.models`."""

    quantity: Literal["comparisons", "wins", "ties"]  # wins of model i; a tie counts half
    i: int
    j: int


class ModelSum(NamedTuple):
    """A sum over one model's comparisons, or over its scored replies, each counted once."""

    quantity: Literal["comparisons", "score", "scored"]
    model: int


Sum = PairSum | ModelSum


class Tournament:
    """Collects comparisons between models, prompt by prompt, and computes win rates, ratings and mean scores.

    Memory: 12 to 36 bytes a prompt and a reply.

    Args:
        models: Names of the models, in the order of the results.

    Examples:
        >>> Tournament(["start", "sl-cai"]).result()["win_rates"]
        []
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.models = list(models)
        self.places = {name: place for place, name in enumerate(models)}
        self.pairs = list(combinations(range(len(models)), 2))
        self.sums: dict[Kind | None, ClusterBootstrap[Sum]] = {}
        self.prompts, self.scored_replies = KeyTable(), KeyTable()

    def observe(self, row: ModelComparison | Rejected) -> None:
        """Add a comparison; ignore a rejected one."""
        if isinstance(row, ModelComparison):
            self.add(row)

    def add(self, row: ModelComparison) -> None:
        """Add one comparison of two of the models."""
        i, j = self.places[row.model_a], self.places[row.model_b]
        won = win_or_half(row.p_a)
        values: dict[Sum, float] = {
            PairSum("comparisons", i, j): 1.0,
            PairSum("wins", i, j): won,
            PairSum("ties", i, j): won == 0.5,
            ModelSum("comparisons", i): 1.0,
            ModelSum("comparisons", j): 1.0,
        }
        for model, score in ((i, row.score_a), (j, row.score_b)):
            if score is not None and self._is_new(f"{model} {row.prompt_id}/{row.sample_index}"):
                values |= {ModelSum("score", model): score, ModelSum("scored", model): 1.0}
        self.sums.setdefault(row.kind, ClusterBootstrap(self._columns())).add(
            self.prompts.number(row.prompt_id), values
        )

    def _is_new(self, reply: str) -> bool:
        return self.scored_replies.add(reply, 0) is None

    def _columns(self) -> list[Sum]:
        of_pairs = [PairSum(name, i, j) for name in ("comparisons", "wins", "ties") for i, j in self.pairs]
        of_models = [ModelSum(name, i) for name in ("comparisons", "score", "scored") for i in range(len(self.models))]
        return [*of_pairs, *of_models]

    def result(self) -> dict[str, Any]:
        """Return the results, each value with its 95% interval.

        Returns:
            `models`: their names. `win_rates`: of model `a` over model `b`, by kind of prompt. `ratings`: Elo by axis
            ("harmless", "helpful") and model. `scores`: mean score of a preference model by axis and model.
            `simultaneous`: the number of simultaneous intervals of each of these.
        """
        win_rates = self.win_rates()
        axes = {axis: self.sums.get(kind) for axis, kind in AXES.items()}
        rated = [self._observed("comparisons", sums) for sums in axes.values()]
        ratings = sum(1 if models == 2 else models for models in rated)  # of two models one rating determines the other
        scores = sum(self._observed("scored", sums) for sums in axes.values())
        return {
            "models": self.models,
            "win_rates": win_rates,
            "ratings": {axis: self._ratings(sums, ratings) for axis, sums in axes.items()},
            "scores": {axis: self._scores(sums, scores) for axis, sums in axes.items()},
            "simultaneous": {"win_rates": len(win_rates), "ratings": ratings, "scores": scores},
        }

    def _observed(self, quantity: Literal["comparisons", "scored"], sums: ClusterBootstrap[Sum] | None) -> int:
        """Return how many models have comparisons, or scored replies."""
        return sum(sums.total(ModelSum(quantity, i)) > 0 for i in range(len(self.models))) if sums else 0

    def win_rates(self) -> list[dict[str, Any]]:
        """Return the win rate of every two models that were compared, by kind of prompt.

        Returns:
            For each, the names `a` and `b`, the `kind`, the estimate with its simultaneous interval, the number of
            `ties` and that of `prompts`.
        """
        compared = [
            (kind, self.sums[kind], i, j)
            for kind in sorted(self.sums, key=str, reverse=True)
            for i, j in self.pairs
            if self.sums[kind].total(PairSum("comparisons", i, j))
        ]
        rates = []
        for kind, sums, i, j in compared:
            rate = sums.share(PairSum("wins", i, j), PairSum("comparisons", i, j), len(compared))
            ties = round(sums.total(PairSum("ties", i, j)))
            prompts = sums.clusters(PairSum("comparisons", i, j))
            named = {"a": self.models[i], "b": self.models[j], "kind": kind}
            rates.append({**named, **(rate or {}), "ties": ties, "prompts": prompts})
        return rates

    def _ratings(self, sums: ClusterBootstrap[Sum] | None, among: int) -> list[dict[str, Any]]:
        if sums is None:
            return []
        fits: dict[int, Numbers] = {}  # number of resamples -> (resamples, models): one fit rates all models

        def rating(model: int, resampled: Mapping[Sum, "Numbers"]) -> "Numbers":
            resamples = len(resampled[ModelSum("comparisons", 0)])
            if resamples not in fits:
                fits[resamples] = _bradley_terry(resampled, self.pairs, len(self.models))
            return fits[resamples][:, model]

        ratings = [
            sums.estimate(lambda s, i=i: rating(i, s), ModelSum("comparisons", i), UNBOUNDED, among)  # type: ignore[misc]
            for i in range(len(self.models))
        ]
        return self._by_model(r and self._widened(r, i, sums, among) for i, r in enumerate(ratings))

    def _widened(self, rating: Estimate, model: int, sums: ClusterBootstrap[Sum], among: int) -> Estimate:
        """Return a rating whose interval is at least as wide as that of the win share on the Elo scale.

        Where a model wins every comparison, or ties every one, all resamples are equal.
        """
        wins = clustered_share(self._wins(model, sums), sums.by_cluster(ModelSum("comparisons", model)), among)
        assert wins  # noqa: S101
        prompts = sums.clusters(ModelSum("comparisons", model))

        def elo(p: float) -> float:
            odds = (p * prompts + 0.5) / ((1 - p) * prompts + 0.5)  # the fit adds half a win on either side
            return ELO_SCALE * math.log10(odds) * (1 - 1 / len(self.models))

        low, high = (rating["value"] + elo(end) - elo(wins["value"]) for end in (wins["low"], wins["high"]))
        covering = widened(rating, {**wins, "low": low, "high": high})
        low, high = max(RATING_LIMITS[0], covering["low"]), min(RATING_LIMITS[1], covering["high"])
        return {**rating, "low": low, "high": high}

    def _wins(self, model: int, sums: ClusterBootstrap[Sum]) -> "Numbers":
        """Return how many comparisons `model` won on each prompt, ties counted half, shape (blocks,)."""
        wins = 0 * sums.by_cluster(ModelSum("comparisons", model))
        for i, j in self.pairs:
            if model == i:
                wins += sums.by_cluster(PairSum("wins", i, j))
            elif model == j:
                wins += sums.by_cluster(PairSum("comparisons", i, j)) - sums.by_cluster(PairSum("wins", i, j))
        return wins

    def _scores(self, sums: ClusterBootstrap[Sum] | None, among: int) -> list[dict[str, Any]]:
        if sums is None:
            return []
        return self._by_model(_mean_score(sums, model, among) for model in range(len(self.models)))

    def _by_model(self, estimates: Iterable[Estimate | None]) -> list[dict[str, Any]]:
        return [{"model": m, **estimate} for m, estimate in zip(self.models, estimates, strict=True) if estimate]


def _mean_score(sums: ClusterBootstrap[Sum], model: int, among: int) -> Estimate | None:
    score, count = ModelSum("score", model), ModelSum("scored", model)
    return sums.estimate(lambda s: s[score] / s[count], count, SCORE_LIMITS, among)


def _bradley_terry(sums: Mapping[Sum, "Numbers"], pairs: Sequence[tuple[int, int]], models: int) -> "Numbers":
    """Return ratings on the Elo scale, shape (resamples, models), fitted to the wins of every resample."""
    import evalica
    import numpy as np

    xs = [i for pair in pairs for i in (pair[0], pair[0])]
    ys = [j for pair in pairs for j in (pair[1], pair[1])]
    winners = [evalica.Winner.X, evalica.Winner.Y] * len(pairs)
    wins = np.stack([sums[PairSum("wins", i, j)] for i, j in pairs], axis=1)
    comparisons = np.stack([sums[PairSum("comparisons", i, j)] for i, j in pairs], axis=1)
    weights = np.stack([wins + 0.5, comparisons - wins + 0.5], axis=2).reshape(len(wins), -1)
    strengths = np.empty((len(wins), models))
    for resample, row in enumerate(weights):
        fit = evalica.bradley_terry(xs, ys, winners, weights=row.tolist(), tolerance=1e-9, limit=100_000)
        strengths[resample] = [fit.scores[model] for model in range(models)]
    logs = np.log10(strengths)
    ratings: Numbers = MEAN_RATING + ELO_SCALE * (logs - logs.mean(axis=1, keepdims=True))
    return ratings
