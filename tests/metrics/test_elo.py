"""Win rates, ratings and mean scores of models from pairwise comparisons."""

import json
import math
import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import evalica
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.schema import Kind
from cai_cli.metrics.elo import Tournament
from cai_cli.metrics.intervals import SHARE, mean_estimate
from cai_cli.prompting.base import assistant, user

Json = dict[str, Any]


def comparison(
    prompt: int,
    p_a: float,
    a: str = "one",
    b: str = "two",
    kind: Kind | None = "red-team",
    scores: tuple[float | None, float | None] = (None, None),
) -> ModelComparison:
    return ModelComparison(
        id=f"p{prompt}/0 {a}:{b}", prompt_id=f"p{prompt}", sample_index=0, prompt=[user(f"question {prompt}")], kind=kind,
        model_a=a, model_b=b, a=[assistant("reply")], b=[assistant("reply")], score_a=scores[0], score_b=scores[1],
        p_a=p_a, votes=[],
    )  # fmt: skip


def result(rows: Sequence[ModelComparison], models: Sequence[str] = ("one", "two")) -> Json:
    tournament = Tournament(models)
    for row in rows:
        tournament.add(row)
    return tournament.result()


def rating(outcome: Json, axis: str = "harmless") -> dict[str, float]:
    return {r["model"]: r["value"] for r in outcome["ratings"][axis]}


def test_a_win_rate_counts_ties_half_and_lies_within_its_interval() -> None:
    rows = (
        [comparison(i, 0.9) for i in range(60)]
        + [comparison(60 + i, 0.2) for i in range(30)]
        + [comparison(90 + i, 0.5) for i in range(10)]
    )
    (rate,) = result(rows)["win_rates"]
    assert (rate["a"], rate["b"], rate["kind"], rate["n"], rate["ties"]) == ("one", "two", "red-team", 100, 10)
    assert rate["value"] == pytest.approx(0.65)
    assert 0.5 < rate["low"] < 0.65 < rate["high"] < 0.8


def test_five_wins_of_six_claim_nothing() -> None:
    (rate,) = result([comparison(i, 0.9 if i else 0.1) for i in range(6)])["win_rates"]
    assert rate["value"] == pytest.approx(5 / 6)
    assert rate["low"] < 0.5


def test_the_rating_of_two_models_is_the_paper_s_elo_of_their_win_rate() -> None:
    outcome = rating(result([comparison(i, 0.9 if i % 4 else 0.1) for i in range(4000)]))
    assert sum(outcome.values()) == pytest.approx(2000)
    assert 1 / (1 + 10 ** (-(outcome["one"] - outcome["two"]) / 400)) == pytest.approx(0.75, abs=0.001)


def test_ratings_recover_the_strengths_that_made_the_comparisons() -> None:
    rng, elo = random.Random(1), {"a": 1150.0, "b": 1000.0, "c": 850.0}
    names, rows = list(elo), []
    for prompt in range(1500):
        for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
            wins = rng.random() < 1 / (1 + 10 ** (-(elo[x] - elo[y]) / 400))
            rows.append(comparison(prompt, 0.8 if wins else 0.2, x, y))
    outcome = result(rows, names)
    for row in outcome["ratings"]["harmless"]:
        assert row["low"] < row["value"] < row["high"]
        assert row["low"] - 5 < elo[row["model"]] < row["high"] + 5
        assert row["high"] - row["low"] < 40
        assert row["n"] == 3000
    backwards = rating(result(list(reversed(rows)), names))
    assert rating(outcome) == pytest.approx(backwards)


def test_a_model_that_always_wins_has_a_finite_rating_and_an_interval() -> None:
    outcome = result([comparison(i, 0.99) for i in range(10)])
    assert math.isfinite(rating(outcome)["one"])
    (rate,) = outcome["win_rates"]
    assert (rate["value"], rate["high"]) == (1.0, 1.0)
    assert 0.6 < rate["low"] < 1.0  # Wilson's: ten wins do not prove that it always wins
    json.dumps(outcome, allow_nan=False)


def test_harmlessness_and_helpfulness_are_kept_apart_and_other_prompts_have_no_rating() -> None:
    kinds: list[Kind | None] = ["red-team", "helpful", None]
    rows = [comparison(10 * k + i, (0.9, 0.1, 0.5)[k], kind=kind) for k, kind in enumerate(kinds) for i in range(10)]
    outcome = result(rows)
    assert {(r["kind"], r["value"]) for r in outcome["win_rates"]} == {("red-team", 1.0), ("helpful", 0.0), (None, 0.5)}
    assert rating(outcome)["one"] > rating(outcome)["two"]
    assert rating(outcome, "helpful")["one"] < rating(outcome, "helpful")["two"]
    assert [r["n"] for axis in outcome["ratings"].values() for r in axis] == [10] * 4


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0])), min_size=1, max_size=12))
def test_every_estimate_lies_within_its_interval(outcomes: list[tuple[int, float]]) -> None:
    rows = [comparison(prompt, p).model_copy(update={"sample_index": i}) for i, (prompt, p) in enumerate(outcomes)]
    outcome = result(rows)
    estimates: list[Any] = [*outcome["win_rates"], *outcome["ratings"]["harmless"]]
    assert len(estimates) == 3
    for estimate in estimates:
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert math.isfinite(estimate["low"] + estimate["high"])


@pytest.mark.parametrize(("won", "of"), [(10, 11), (12, 12), (29, 30), (30, 30), (6, 7), (4, 4), (15, 20), (70, 100)])
def test_ratings_are_as_sure_as_the_win_rate_they_come_from(won: int, of: int) -> None:
    rated = result([comparison(i, 0.9 if i < won else 0.1) for i in range(of)])
    (rate,) = rated["win_rates"]
    better, worse = rated["ratings"]["harmless"]
    assert better["high"] - better["low"] < 1000
    assert better["low"] <= better["value"] <= better["high"]
    if rate["low"] <= 0.5:
        assert better["low"] <= worse["high"]
    elif rate["low"] > 0.55:
        assert better["low"] > worse["high"]


def test_all_ties_leave_no_more_open_than_their_number_does() -> None:
    for rating in result([comparison(i, 0.5) for i in range(12)])["ratings"]["harmless"]:
        assert rating["value"] == pytest.approx(1000)
        assert 1000 - rating["low"] == pytest.approx(rating["high"] - 1000)
        assert 50 < rating["high"] - 1000 < 150


@pytest.mark.parametrize("models", [2, 6])
def test_models_that_are_alike_get_a_claim_in_one_of_twenty_runs_at_most(models: int) -> None:
    """Each interval alone, some model of six would beat another in two runs of three."""
    names, rng, runs, claimed = [str(m) for m in range(models)], random.Random(models), 40, 0
    kinds: tuple[Kind, Kind] = ("red-team", "helpful")
    for _ in range(runs):
        tournament = Tournament(names)
        for kind in kinds:
            for prompt in range(15):
                quality = {name: rng.gauss(0, 1) for name in names}
                for a, b in combinations(names, 2):
                    tournament.add(comparison(prompt, 0.9 if quality[a] > quality[b] else 0.1, a, b, kind))
        rates = tournament.win_rates()
        assert len(rates) == models * (models - 1)
        claimed += any(not rate["low"] <= 0.5 <= rate["high"] for rate in rates)
    assert claimed <= 2


def test_the_best_of_four_models_is_still_found() -> None:
    names, rng, rows = ["a", "b", "c", "best"], random.Random(1), []
    for prompt in range(150):
        quality = {name: rng.gauss(name == "best", 1) for name in names}
        rows += [comparison(prompt, 0.9 if quality[a] > quality[b] else 0.1, a, b) for a, b in combinations(names, 2)]
    rates = result(rows, names)["win_rates"]
    assert [rate["high"] < 0.5 for rate in rates] == [rate["b"] == "best" for rate in rates]


def test_a_result_counts_its_simultaneous_intervals() -> None:
    kinds: tuple[Kind, Kind] = ("red-team", "helpful")
    rows = [
        comparison(8 * axis + i, 0.9, a, b, kind, (0.1 * i, -0.2 * i))
        for axis, kind in enumerate(kinds)
        for i in range(8)
        for a, b in combinations(("one", "two", "three"), 2)
    ]
    three, two = result(rows, ("one", "two", "three")), result([comparison(i, 0.9) for i in range(8)])
    assert three["simultaneous"] == {"win_rates": 6, "ratings": 6, "scores": 6}
    assert two["simultaneous"] == {"win_rates": 1, "ratings": 1, "scores": 0}


# --- against independent computations, and against recorded results ---------------------------------------------------

MODELS = ("a", "b", "c")


def random_comparisons(seed: int) -> list[ModelComparison]:
    rng = random.Random(seed)
    rows = []
    for prompt in range(40):
        scores = {model: rng.gauss(0, 1) for model in MODELS}
        for a, b in rng.sample(list(combinations(MODELS, 2)), rng.randrange(1, 4)):
            p_a = rng.choice((0.5, round(rng.random(), 3), round(rng.random(), 3)))
            rows.append(comparison(prompt, p_a, a, b, "helpful" if prompt % 3 else "red-team", (scores[a], scores[b])))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_random_comparisons_add_up_to_what_counting_by_hand_gives(seed: int) -> None:
    rows = random_comparisons(seed)
    found = result(rows, MODELS)
    for kind, axis in (("red-team", "harmless"), ("helpful", "helpful")):
        of_kind = [row for row in rows if row.kind == kind]
        rates = {(r["a"], r["b"]): r for r in found["win_rates"] if r["kind"] == kind}
        xs, ys, winners, weights = [], [], [], []
        for a, b in combinations(MODELS, 2):
            p = [row.p_a for row in of_kind if (row.model_a, row.model_b) == (a, b)]
            wins, ties = sum(x > 0.5 for x in p), sum(x == 0.5 for x in p)
            if p:
                rate = rates[a, b]
                assert (rate["value"], rate["n"], rate["ties"]) == ((wins + ties / 2) / len(p), len(p), ties)
                values = [0.5 if x == 0.5 else float(x > 0.5) for x in p]  # each prompt compares two models once
                among = len(found["win_rates"])
                assert {k: rate[k] for k in ("value", "low", "high", "n")} == mean_estimate(values, SHARE, among=among)
            xs += [a, a]
            ys += [b, b]
            winners += [evalica.Winner.X, evalica.Winner.Y]
            weights += [wins + ties / 2 + 0.5, len(p) - wins - ties / 2 + 0.5]
        strengths = evalica.bradley_terry(xs, ys, winners, weights=weights, tolerance=1e-9, limit=100_000).scores
        logs = {model: math.log10(strengths[model]) for model in MODELS}
        expected = {model: 1000 + 400 * (logs[model] - sum(logs.values()) / len(MODELS)) for model in MODELS}
        assert rating(found, axis) == pytest.approx(expected, abs=1e-6)
        for mean in found["scores"][axis]:
            replies = {
                row.prompt_id: score
                for row in of_kind
                for model, score in ((row.model_a, row.score_a), (row.model_b, row.score_b))
                if model == mean["model"]
            }
            assert (mean["n"], mean["value"]) == (
                len(replies),
                pytest.approx(sum(filter(None, replies.values())) / len(replies)),
            )


def test_the_intervals_of_random_comparisons_are_those_recorded() -> None:
    found = result(random_comparisons(7), MODELS)
    estimates = [*found["win_rates"], *found["ratings"]["helpful"], *found["scores"]["helpful"]]
    recorded = [
        (0.2727272727272727, 0.07359410483301342, 0.6390144272550913, 11),
        (0.55, 0.22208211303583836, 0.8395542441720761, 10),
        (0.35, 0.0736506375615317, 0.7847964783837541, 10),
        (0.5294117647058824, 0.246227293133982, 0.7948483498252947, 17),
        (0.6333333333333333, 0.35626586680845507, 0.8435253511992361, 15),
        (0.35714285714285715, 0.17536912465698964, 0.5920555607600959, 21),
        (1033.5011075053126, 933.8590225912716, 1144.6741728808456, 32),
        (958.1525313507167, 876.2690607796413, 1034.0640591615256, 38),
        (1008.3463611439706, 914.3630975586441, 1093.4417242020547, 36),
        (0.1601014929513794, -0.5990666888295662, 0.8839093381326292, 21),
        (-0.3161488525981058, -0.9981275928797302, 0.3071316693723218, 24),
        (-0.10636862950458097, -0.7223847335117007, 0.5038024872750779, 23),
    ]  # by version 0.2
    assert [(e["value"], e["low"], e["high"], e["n"]) for e in estimates] == [
        (pytest.approx(v, rel=1e-9), pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9), n)
        for v, low, high, n in recorded
    ]
