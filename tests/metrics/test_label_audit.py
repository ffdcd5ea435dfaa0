"""The audit of labels: it recovers a judge's planted faults from its votes, and does not trust worthless labels."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Cai
from helpers import write_rows

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair, Preference, Rejected, dump_row, reject
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


def pref(
    number: int,
    *votes: tuple[str, str, float],
    p_chosen: float | None = None,
    human: str | None = None,
    prompt: int | None = None,
    replies: tuple[str, str] = ("aaaa", "bbbb"),
) -> Preference:
    """`votes`: (principle, order, p_first)."""
    shares = [p if order == "ab" else 1 - p for _, order, p in votes]
    return Preference.model_validate(
        {
            "id": f"p{number}",
            "prompt": [user(f"question {number if prompt is None else prompt}").model_dump()],
            "chosen": [assistant(replies[0]).model_dump()],
            "rejected": [assistant(replies[1]).model_dump()],
            "p_chosen": p_chosen or sum(shares) / len(shares),
            "votes": [
                {"principle_id": k, "method": "choice", "order": order, "p_first": p, "rationale": None}
                for k, order, p in votes
            ],
            "human": human,
            "source": None,
        }
    )


def steady(number: int, human: str | None = None, **more: Any) -> Preference:
    """A pair whose winner is the same in both orders."""
    return pref(number, ("kind", "ab", 0.9), ("kind", "ba", 0.2), human=human, **more)


def flipped(number: int, human: str | None = None, **more: Any) -> Preference:
    """A pair of which the first reply wins in either order."""
    return pref(number, ("kind", "ab", 0.9), ("kind", "ba", 0.8), human=human, **more)


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


# --- trust ------------------------------------------------------------------------------------------------------------


def verdict(rows: Iterable[Preference], rejected: Iterable[Rejected] = ()) -> tuple[bool | None, str]:
    found = audit(rows, rejected)
    return found["trusted"], found["reason"]


def test_labels_are_trusted_where_agreement_is_above_chance_and_not_where_it_may_be_chance() -> None:
    trusted, why = verdict(steady(i, "chosen" if i % 4 else "rejected") for i in range(100))
    assert trusted is True
    assert why.startswith("the judge agrees with humans on 75.0% (")
    trusted, why = verdict(steady(i, "chosen" if i % 2 else "rejected") for i in range(100))
    assert trusted is False
    assert why.endswith("of 100 labelled pairs, which cannot be distinguished from chance")
    trusted, why = verdict(steady(i, "rejected" if i % 4 else "chosen") for i in range(100))
    assert trusted is False
    assert why.endswith("is worse than chance")


def test_three_pairs_that_agree_do_not_make_a_judge() -> None:
    assert verdict(steady(i, "chosen") for i in range(3))[0] is False
    assert verdict(steady(i, "chosen", prompt=0) for i in range(50))[0] is False  # nor do fifty of one prompt
    assert verdict(steady(i, "chosen") for i in range(10))[0] is True


def test_without_humans_a_steady_judge_is_not_known_and_one_that_flips_like_a_coin_is_not_trusted() -> None:
    trusted, why = verdict(steady(i) for i in range(50))
    assert trusted is None
    assert "agreement is unknown without human labels" in why
    backward = (pref(50 + i, ("kind", "ab", 0.3), ("kind", "ba", 0.1)) for i in range(12))
    trusted, why = verdict([*backward, *(flipped(i) for i in range(13)), *(steady(i) for i in range(25, 50))])
    assert trusted is False
    assert "like a judge that does not read them" in why
    trusted, why = verdict(flipped(i) for i in range(50))
    assert trusted is False


def test_with_one_order_a_position_bias_is_in_the_labels() -> None:
    first = [pref(i, ("kind", "ab", 0.8)) for i in range(45)]
    second = [pref(100 + i, ("kind", "ba", 0.3)) for i in range(45)]
    trusted, why = verdict(first)
    assert trusted is False
    assert why.startswith("the judge saw one order only, and picks the first reply in 100.0%")
    assert verdict([*first, *second]) == (
        None,
        "agreement is unknown: there are no human labels, and the judge saw one order only",
    )


def test_the_contrast_method_has_no_position_bias() -> None:
    rows = [pref(i, ("kind", "ab", 0.8)) for i in range(45)]
    contrasts = [r.model_copy(update={"votes": [r.votes[0].model_copy(update={"method": "contrast"})]}) for r in rows]
    found = audit(contrasts)
    assert found["first_picks"] is found["position"] is None
    assert (found["trusted"], found["reason"]) == (
        None,
        "agreement is unknown: there are no human labels, and the judge saw one order only",
    )


def test_only_ties_are_not_trusted_and_without_votes_trust_is_unknown() -> None:
    tie = reject("p1", "tie", pref(1, ("kind", "ab", 0.8), ("kind", "ba", 0.8)))
    assert verdict([], [tie]) == (False, "no pair got a preference: 1 tie")
    assert verdict([]) == (None, "there are no votes to audit")
    assert verdict([pref(1, p_chosen=1.0, human="chosen")])[0] is None


def test_ties_count_as_flips_of_the_judge_and_failures_are_counted_by_reason() -> None:
    """A judge that only says A or B ties on every pair it flips on: without the ties it would look steady."""
    ties = [reject(f"t{i}", "tie", pref(i, ("kind", "ab", 1.0), ("kind", "ba", 1.0))) for i in range(30)]
    failures = [reject("f", "too long", user("x")), reject("g", "too long", user("y"))]
    found = audit([steady(100 + i) for i in range(10)], [*ties, *failures])
    assert values(found, "flip_rate") == [(0.75, 40)]
    assert (found["pairs"], found["ties"], found["rejected"]) == (10, 30, {"too long": 2})
    assert "2 pairs besides the 30 ties have no label; see their reasons" in found["notes"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_every_metric_and_writes_it_once(cai: Cai, tmp_path: Path) -> None:
    rows = [steady(i, "chosen" if i % 3 else "rejected") for i in range(30)]
    write_rows(tmp_path / "prefs.jsonl", (orjson.loads(dump_row(row)) for row in rows))
    tie = reject("p99", "tie", flipped(99))
    write_rows(tmp_path / "prefs.jsonl.rejected.jsonl", [orjson.loads(dump_row(tie))])
    done = cai("eval", "agreement", "prefs.jsonl", "--json", "-o", "audit.json")
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "audit.json").read_text()) == audit(rows, [tie])
    assert set(found["agreement"]) == {"value", "low", "high", "n"}
    assert cai("eval", "agreement", "prefs.jsonl", "-o", "audit.json").code == 1
    table = cai("eval", "agreement", "prefs.jsonl", "-o", "audit.json", "--overwrite").stdout
    assert table.startswith("trusted: ")
    for name in ("agreement", "flip rate", "right at 0.8 to 0.9", "kind: mean p first", "1 ties"):
        assert name in table
    piped = cai("eval", "agreement", "-", "--json", stdin=(tmp_path / "prefs.jsonl").read_bytes())
    assert json.loads(piped.stdout)["ties"] == 0


def test_an_invalid_row_is_named_with_file_and_line(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "prefs.jsonl", [orjson.loads(dump_row(steady(1))), {"id": "x"}])
    done = cai("eval", "agreement", "prefs.jsonl")
    assert done.code == 1
    assert "prefs.jsonl:2: not a Preference row" in done.stderr
