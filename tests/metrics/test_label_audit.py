"""The audit of labels: it recovers a judge's planted faults from its votes, and does not trust worthless labels."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from label_rows import flipped, pref, steady

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair, Preference, Rejected, reject
from cai_cli.engines.base import LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.judge import Judge
from cai_cli.judging.votes import Labeller
from cai_cli.metrics.label_audit import audit
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import assistant, user


class PlantedJudge(ScriptedEngine):
    """Picks the first reply in a share `position` of questions, at random in a share `noise`, and otherwise what the
    principle prefers, which is what humans prefer (reply "good") on the share `likes` of pairs."""

    def __init__(self, position: float, noise: float, likes: dict[str, float], seed: int) -> None:
        self.position, self.noise, self.likes, self.seed = position, noise, likes, seed

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        return [self._answer(str(question.text)) for question in requests]

    def _answer(self, text: str) -> list[float] | RequestFailure:
        (number, first), (_, _second) = re.findall(r"reply (\d+) (good|bad)", text)
        principle = next(name for name in self.likes if f"by {name}?" in text)
        agrees = random.Random(f"{self.seed} {number} {principle}").random() < self.likes[principle]
        draw = random.Random(f"{self.seed} {number} {principle} {first}")
        how = draw.random()
        if how < self.position:
            picks_first = True
        elif how < self.position + self.noise:
            picks_first = draw.random() < 0.5
        else:
            picks_first = (first == "good") == agrees
        winner = draw.uniform(0.55, 0.95)
        p = winner if picks_first else 1 - winner
        return [math.log(p), math.log(1 - p)]


def planted_rows(judge: PlantedJudge, pairs: int) -> list[Preference | Rejected]:
    """The labels that `label_prefs` makes from the judge's answers."""
    pairs_to_label = []
    for i in range(pairs):
        good, bad = [assistant(f"reply {i} good")], [assistant(f"reply {i} bad")]
        fields = {"id": f"p{i}/0-1", "prompt": [user(f"question {i}")], "source": None}
        pairs_to_label.append(
            Pair(a=good, b=bad, human="a", **fields) if i % 2 else Pair(a=bad, b=good, human="b", **fields)
        )
    principles = [PreferencePrinciple(id=name, comparison=f"Which is better by {name}?") for name in judge.likes]
    feedback_model = Judge(judge, "choice", [], "raw", judge.seed, Sampling())
    rows = label_prefs(pairs_to_label, Labeller(feedback_model, principles, 1, ("ab", "ba")))
    assert all(isinstance(row, Preference) for row in rows)
    return rows


@pytest.mark.parametrize(("position", "noise"), [(0.5, 0.2), (0.1, 0.6), (0.0, 0.0)])
def test_the_audit_recovers_a_planted_position_noise_and_principles_within_its_intervals(
    position: float, noise: float
) -> None:
    likes = {"kindness": 0.9, "truth": 0.7, "brevity": 0.4}
    content = 1 - position - noise
    # In the order that helps its favourite the judge picks it unless the coin says no; in the other order it has
    # place and coin against it.
    with_help, against = 1 - noise / 2, position + noise / 2
    truth = {
        "position": position,
        "noise": noise,
        "content": content,
        "first_picks": (1 + position) / 2,
        "flip_rate": with_help * against + (1 - with_help) * (1 - against),
    }
    truth |= {name: (share * (1 + content) + (1 - share) * (1 - content)) / 2 for name, share in likes.items()}
    covered: Counter[str] = Counter()
    seeds = 60
    for seed in range(seeds):
        found = audit(planted_rows(PlantedJudge(position, noise, likes, seed), 300))
        metrics = found | {name: found["principles"][name]["agreement"] for name in likes}
        for name, true in truth.items():
            covered[name] += metrics[name]["low"] - 1e-9 <= true <= metrics[name]["high"] + 1e-9
    assert {name: count for name, count in covered.items() if count < 0.85 * seeds} == {}
    # ... and the intervals of 300 pairs are narrow enough to say something.
    counted = ("position", "first_picks", "flip_rate", *likes)
    assert all(metrics[name]["high"] - metrics[name]["low"] < 0.25 for name in counted)


# --- metrics of votes given by hand -----------------------------------------------------------------------------------


def values(found: dict[str, Any], *names: str) -> list[tuple[float, int]]:
    return [(round(found[name]["value"], 6), found[name]["n"]) for name in names]


def test_flips_are_counted_by_pair_and_first_picks_by_vote() -> None:
    found = audit([steady(1), flipped(2), flipped(3), steady(4)])
    assert values(found, "flip_rate", "first_picks", "mean_p_first") == [(0.5, 4), (0.75, 8), (0.7, 8)]
    assert (found["pairs"], found["votes"], found["agreement"]) == (4, 8, None)


def test_a_vote_of_one_half_names_no_winner_and_is_left_out() -> None:
    found = audit([pref(1, ("kind", "ab", 0.9), ("kind", "ba", 0.5)), steady(2)])
    assert values(found, "flip_rate", "first_picks", "mean_p_first") == [(0.0, 1), (0.666667, 3), (0.625, 4)]


def test_several_votes_in_one_order_are_one_answer_to_it() -> None:
    votes = [("kind", "ab", 0.9), ("kind", "ab", 0.4), ("kind", "ba", 0.1), ("kind", "ba", 0.45)]
    found = audit([pref(1, *votes), steady(2)])
    assert values(found, "flip_rate") == [(0.0, 2)]
    assert found["first_picks"]["n"] == 6


def test_agreement_between_principles_counts_pairs_of_them() -> None:
    three = pref(1, ("a", "ab", 0.9), ("b", "ab", 0.8), ("c", "ab", 0.3))
    two = pref(2, ("a", "ab", 0.9), ("b", "ba", 0.2))
    found = audit([three, two])
    assert values(found, "between_principles") == [(0.5, 4)]
    assert sorted(found["principles"]) == ["a", "b", "c"]
    assert [found["principles"][k]["pairs"] for k in "abc"] == [2, 2, 1]


def test_each_principle_is_held_against_the_humans_on_its_own() -> None:
    rows = [pref(i, ("good", "ab", 0.9), ("bad", "ab", 0.4), human="chosen") for i in range(4)]
    found = audit(rows)
    assert values(found["principles"]["good"], "agreement", "mean_p_first") == [(1.0, 4), (0.9, 4)]
    assert values(found["principles"]["bad"], "agreement", "mean_p_first") == [(0.0, 4), (0.4, 4)]
    assert values(found, "agreement") == [(1.0, 4)]


def test_a_label_of_one_half_is_half_right_and_humans_only_are_left_alone() -> None:
    half = pref(1, ("kind", "ab", 0.5), human="chosen")
    alone = pref(2, p_chosen=1.0, human="chosen")
    found = audit([half, alone, steady(3, "chosen"), steady(4, "rejected")])
    assert values(found, "agreement") == [(0.5, 3)]
    assert (found["pairs"], found["human_only"]) == (3, 1)


def test_the_intervals_of_several_principles_are_simultaneous() -> None:
    def first(*principles: str) -> Any:
        rows = [
            pref(20 * place + i, (name, "ab", 0.9), human="chosen" if i % 4 else "rejected")
            for place, name in enumerate(principles)
            for i in range(20)
        ]
        return audit(rows)["principles"][principles[0]]["agreement"]

    alone, among_four = first("a"), first("a", "b", "c", "d")
    assert (alone["value"], alone["n"]) == (among_four["value"], among_four["n"]) == (0.75, 20)
    assert alone["low"] > 0.5 > among_four["low"]


def test_the_calibration_error_stands_beside_that_of_a_calibrated_judge() -> None:
    calibrated = audit([pref(i, ("kind", "ab", 0.8), human="chosen" if i % 5 else "rejected") for i in range(50)])
    assert calibrated["calibration_error"]["value"] == pytest.approx(0, abs=1e-9)
    assert calibrated["calibration_error_if_calibrated"] == pytest.approx(math.sqrt(2 / math.pi * 0.16 / 50), rel=0.1)
    assert audit([])["calibration_error_if_calibrated"] is None


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_share_right() -> None:
    def rows(first: int, p: float, right: int, n: int) -> list[Preference]:
        return [pref(first + i, ("kind", "ab", p), human="chosen" if i < right else "rejected") for i in range(n)]

    found = audit([*rows(0, 0.95, 6, 10), *rows(10, 0.65, 6, 10), *rows(20, 1.0, 10, 10)])
    # The bin from 0.9 holds the 0.95s and the 1s: confidence 0.975, 16 of 20 right; that from 0.6 is 0.65 against 0.6.
    assert values(found, "calibration_error") == [(round((20 * 0.175 + 10 * 0.05) / 30, 6), 30)]
    assert [
        (b["from"], b["to"], b["n"], round(b["confidence"], 6), b["right"]["value"]) for b in found["reliability"]
    ] == [
        (0.6, 0.7, 10, 0.65, 0.6),
        (0.9, 1.0, 20, 0.975, 0.8),
    ]


def test_rows_with_a_repeated_id_are_counted_and_noted() -> None:
    found = audit([steady(1), steady(1), steady(2)], [reject("p2", "too long", user("x"))])
    assert (found["pairs"], found["repeated"]) == (3, 2)
    assert "2 rows repeat the id of an earlier row; they are counted as well" in found["notes"]
    assert audit([steady(1), steady(2)])["repeated"] == 0


def test_both_orders_weigh_the_same_however_many_rationales_each_has() -> None:
    # 0.6 three times in one order, 0.2 once in the other: 0.4 for chosen, where the plain mean is one half.
    votes = [("kind", "ab", 0.6), ("kind", "ab", 0.6), ("kind", "ab", 0.6), ("kind", "ba", 0.8)]
    found = audit([pref(1, *votes, p_chosen=0.5, human="chosen")])
    assert values(found["principles"]["kind"], "agreement") == [(0.0, 1)]


def test_a_length_bias_is_found_whichever_reply_is_longer() -> None:
    long, short = "x" * 100, "x" * 10
    likes = [pref(i, ("kind", "ab", 0.6 + i / 100), replies=(long, short)) for i in range(20)]
    loathes = [pref(i, ("kind", "ab", 0.6 + i / 100), replies=(short, long)) for i in range(20)]
    equal = [pref(100 + i, ("kind", "ab", 0.9), replies=("same", "size")) for i in range(5)]
    more = audit([*likes, *equal])
    assert values(more, "longer_chosen") == [(1.0, 20)]
    assert more["length_correlation"]["value"] > 0.5
    assert any("the longer reply is chosen in 100.0%" in note for note in more["notes"])
    less = audit(loathes)
    assert values(less, "longer_chosen") == [(0.0, 20)]
    assert less["length_correlation"]["value"] < -0.9
    none = audit([*likes, *(row.model_copy(update={"id": f"o{row.id}"}) for row in loathes)])
    assert values(none, "longer_chosen", "length_correlation") == [(0.5, 40), (0.0, 40)]


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    def rows(one_prompt: bool) -> Iterable[Preference]:
        # Ten pairs a prompt, all right or all wrong.
        for i in range(200):
            human = "chosen" if i // 10 % 2 else "rejected"
            yield steady(i, human, prompt=i // 10 if one_prompt else i)

    apart, together = (audit(rows(one))["agreement"] for one in (False, True))
    assert apart["value"] == together["value"] == 0.5
    ratio = (together["high"] - together["low"]) / (apart["high"] - apart["low"])
    assert 2.5 < ratio < 4  # the square root of ten


def test_an_answer_that_is_certain_stays_within_the_ends_of_its_intervals() -> None:
    """Probabilities of exactly 0 and 1, whose log-odds are the largest there are."""
    for answers in ([1.0] * 60, [0.0] * 60, [1.0, 0.0]):
        found = audit([pref(i, ("p", "ab", p), ("p", "ba", p)) for i, p in enumerate(answers)])
        for name in ("position_log_odds", "position_spread", "preference_spread"):
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], (name, answers)


def test_contrast_votes_in_both_orders_are_audited_though_they_have_no_position() -> None:
    """As in a file made of two others."""
    row = pref(0, ("p", "ab", 1.0), ("p", "ba", 1.0))
    votes = [vote.model_copy(update={"method": "contrast"}) for vote in row.votes]
    found = audit([row.model_copy(update={"votes": votes})])
    assert found["position"] is None
    assert found["content"] is not None
