"""What comparisons of models add up to: win rates and Elo ratings on the paper's two axes (section 4.3, figures 2, 8).

The paper's Elo is a scale, on which a difference of D means a win rate of 1 / (1 + 10^(-D / 400)). Here the ratings on
it are those of Bradley and Terry (evalica), fitted to all comparisons at once, with 1,000 as the mean of the models:
updating game by game as in chess would make them depend on the order of the rows. A tie is half a win for each, and
every two models are given one tie more than they have, so that a model that always wins has a finite rating.

Prompts of kind red-team are the harmlessness axis, those of kind helpful the helpfulness axis; other prompts stand in
the win rates alone. Intervals are bootstraps over prompts: comparisons over one prompt hang together. That of a win
rate is Wilson's where that is wider, as it is for a few prompts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from cai_cli.common.hash_index import KeyTable
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.schema import Kind, Rejected
from cai_cli.metrics.intervals import ClusterBootstrap, Estimate, Limits, wilson

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

AXES: Mapping[str, Kind] = {"harmless": "red-team", "helpful": "helpful"}
MEAN, SCALE = 1000.0, 400.0
RATING: Limits = (-1000.0, 3000.0)  # odds of 100,000 to 1 either way
SCORE: Limits = (-100.0, 100.0)  # of a preference model: a logit


class Tournament:
    """Sums of comparisons between `models`, by prompt, while rows come. Memory: 12 to 36 bytes a prompt and reply."""

    def __init__(self, models: Sequence[str]) -> None:
        self.models = list(models)
        self.places = {name: place for place, name in enumerate(models)}
        self.pairs = list(combinations(range(len(models)), 2))
        self.sums: dict[Kind | None, ClusterBootstrap] = {}
        self.prompts, self.scored = KeyTable(), KeyTable()

    def observe(self, row: ModelComparison | Rejected) -> None:
        """As `add`, for a comparison that may have failed."""
        if isinstance(row, ModelComparison):
            self.add(row)

    def add(self, row: ModelComparison) -> None:
        i, j = self.places[row.model_a], self.places[row.model_b]
        won = 0.5 if row.p_a == 0.5 else float(row.p_a > 0.5)
        values = {f"n {i} {j}": 1.0, f"won {i} {j}": won, f"ties {i} {j}": won == 0.5, f"n {i}": 1.0, f"n {j}": 1.0}
        for place, score in ((i, row.score_a), (j, row.score_b)):
            if score is not None and self._is_new(f"{place} {row.prompt_id}/{row.sample_index}"):
                values |= {f"score {place}": score, f"scores {place}": 1.0}
        self.sums.setdefault(row.kind, ClusterBootstrap(self._columns())).add(
            self.prompts.number(row.prompt_id), values
        )

    def _is_new(self, reply: str) -> bool:
        return self.scored.add(reply, 0) is None

    def _columns(self) -> list[str]:
        of_pairs = [f"{name} {i} {j}" for name in ("n", "won", "ties") for i, j in self.pairs]
        return of_pairs + [f"{name} {i}" for name in ("n", "score", "scores") for i in range(len(self.models))]

    def result(self) -> dict[str, Any]:
        """`models`; `win_rates` of a over b by kind of prompt; `ratings` and, by a preference model, mean `scores` of
        each model on each axis. Every figure with its interval."""
        return {
            "models": self.models,
            "win_rates": list(self._win_rates()),
            "ratings": {axis: self._ratings(self.sums.get(kind)) for axis, kind in AXES.items()},
            "scores": {axis: self._scores(self.sums.get(kind)) for axis, kind in AXES.items()},
        }

    def _win_rates(self) -> Iterator[dict[str, Any]]:
        for kind in sorted(self.sums, key=str, reverse=True):
            sums = self.sums[kind]
            for i, j in self.pairs:
                if figure := _of_few(sums, f"won {i} {j}", f"n {i} {j}"):
                    ties = round(sums.total(f"ties {i} {j}"))
                    yield {"a": self.models[i], "b": self.models[j], "kind": kind, **figure, "ties": ties}

    def _ratings(self, sums: ClusterBootstrap | None) -> list[dict[str, Any]]:
        if sums is None:
            return []
        fits: dict[int, Numbers] = {}  # number of draws -> (draws, models): one fit gives the ratings of all

        def rating(place: int, named: Mapping[str, "Numbers"]) -> "Numbers":
            draws = len(named["n 0"])
            if draws not in fits:
                fits[draws] = _bradley_terry(named, self.pairs, len(self.models))
            return fits[draws][:, place]

        anything = (-math.inf, math.inf)
        figures = [sums.figure(lambda s, i=i: rating(i, s), f"n {i}", anything) for i in range(len(self.models))]  # type: ignore[misc]
        return self._named(figure and self._no_surer(figure, i, sums) for i, figure in enumerate(figures))

    def _no_surer(self, figure: Estimate, model: int, sums: ClusterBootstrap) -> Estimate:
        """A rating with no narrower an interval than Wilson's of the model's share of wins is on the Elo scale: where a
        model wins all, or all are ties, no draw differs, and of a few prompts the bootstrap alone is too sure."""
        won = sum(sums.total(f"won {i} {j}") for i, j in self.pairs if i == model)
        won += sum(sums.total(f"n {i} {j}") - sums.total(f"won {i} {j}") for i, j in self.pairs if j == model)
        prompts = sums.clusters(f"n {model}")
        share = won / sums.total(f"n {model}")
        apart = wilson(share * prompts, prompts)
        assert apart  # noqa: S101
        least = 0.5 / (prompts + 1)  # as half a win is added on either side of every pair

        def elo(p: float) -> float:
            return SCALE * math.log10(max(p, least) / max(1 - p, least)) * (1 - 1 / len(self.models))

        low, high = (figure["value"] + elo(apart[end]) - elo(share) for end in ("low", "high"))
        low, high = min(figure["low"], low), max(figure["high"], high)
        return {**figure, "low": max(RATING[0], low), "high": min(RATING[1], high)}

    def _scores(self, sums: ClusterBootstrap | None) -> list[dict[str, Any]]:
        if sums is None:
            return []
        return self._named(
            sums.figure(lambda s, i=i: s[f"score {i}"] / s[f"scores {i}"], f"scores {i}", SCORE)  # type: ignore[misc]
            for i in range(len(self.models))
        )

    def _named(self, figures: Iterator[Estimate | None]) -> list[dict[str, Any]]:
        return [{"model": m, **figure} for m, figure in zip(self.models, figures, strict=True) if figure]


def _of_few(sums: ClusterBootstrap, won: str, count: str) -> Estimate | None:
    """The share with the wider of two intervals: that of the bootstrap, and Wilson's over prompts. Of a few prompts the
    bootstrap alone is too sure: five wins of six are no proof."""
    figure = sums.share(won, count)
    if figure is None:
        return None
    prompts = sums.clusters(count)
    apart = wilson(figure["value"] * prompts, prompts)
    if apart:
        figure["low"], figure["high"] = min(figure["low"], apart["low"]), max(figure["high"], apart["high"])
    return figure


def _bradley_terry(named: Mapping[str, "Numbers"], pairs: Sequence[tuple[int, int]], models: int) -> "Numbers":
    """(draws, models): ratings on the Elo scale, from columns of wins (`won i j`, ties half) and comparisons."""
    import evalica
    import numpy as np

    xs = [i for pair in pairs for i in (pair[0], pair[0])]
    ys = [j for pair in pairs for j in (pair[1], pair[1])]
    winners = [evalica.Winner.X, evalica.Winner.Y] * len(pairs)
    won = np.stack([named[f"won {i} {j}"] for i, j in pairs], axis=1)
    played = np.stack([named[f"n {i} {j}"] for i, j in pairs], axis=1)
    weights = np.stack([won + 0.5, played - won + 0.5], axis=2).reshape(len(won), -1)
    strengths = np.empty((len(won), models))
    for draw, row in enumerate(weights):
        fit = evalica.bradley_terry(xs, ys, winners, weights=row.tolist(), tolerance=1e-9, limit=100_000)
        strengths[draw] = [fit.scores[model] for model in range(models)]
    logs = np.log10(strengths)
    ratings: Numbers = MEAN + SCALE * (logs - logs.mean(axis=1, keepdims=True))
    return ratings
