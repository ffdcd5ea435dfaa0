"""Principles of known quality are recovered; where nothing is planted, nothing is claimed."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_rows
from label_rows import pref

from cai_cli.data.schema import Preference, reject
from cai_cli.metrics.principle_ranking import LARGEST_LOSS, PrincipleRanking, References, rank_files
from cai_cli.metrics.ranking_table import ranking_lines

Voter = Callable[[random.Random, bool], tuple[float, float]]  # whether `chosen` is better -> p_first in "ab" and "ba"


def with_accuracy(share: float) -> Voter:
    """Prefers the better reply in this share of pairs, in both orders alike."""

    def vote(rng: random.Random, better: bool) -> tuple[float, float]:
        p = 0.7 if (rng.random() < share) == better else 0.3
        return p, 1 - p

    return vote


def noise(rng: random.Random, _better: bool) -> tuple[float, float]:
    return rng.random(), rng.random()


def first(rng: random.Random, _better: bool) -> tuple[float, float]:
    return 0.9 + rng.random() / 20, 0.9 + rng.random() / 20


WORLD = {"informative": with_accuracy(0.8), "inverted": with_accuracy(0.2), "noise": noise, "first": first}


def world(pairs: int, voters: dict[str, Voter], seed: int, *, per_prompt: int = 1) -> list[Preference]:
    rng = random.Random(seed)
    rows = []
    for number in range(pairs):
        better = rng.random() < 0.5
        votes = []
        for name, vote in voters.items():
            p_ab, p_ba = vote(rng, better)
            votes += [(name, "ab", p_ab), (name, "ba", p_ba)]
        human = "chosen" if better else "rejected"
        rows.append(pref(number, *votes, p_chosen=0.6, human=human, prompt=number // per_prompt))
    return rows


def ranking(rows: list[Preference], references: References | None = None) -> dict[str, Any]:
    collected = PrincipleRanking(references or References())
    for row in rows:
        collected.add(row)
    return collected.result()


def by_id(result: dict[str, Any]) -> dict[str, Any]:
    return {principle["id"]: principle for principle in result["principles"]}


def test_planted_principles_are_recovered_within_their_intervals() -> None:
    result = ranking(world(300, WORLD, seed=0))
    found = by_id(result)
    assert (result["reference"], result["panel"], result["simultaneous"]) == ("human", "principles", 4)
    assert [found[name]["finding"] for name in WORLD] == ["agrees", "disagrees", "not shown", "not shown"]
    assert result["principles"][0]["id"] == "informative"
    for name, share in {"informative": 0.8, "inverted": 0.2, "noise": 0.5, "first": 0.5}.items():
        agreement = found[name]["agreement_human"]
        assert agreement["low"] < share < agreement["high"]
    flips = {name: found[name]["flip_rate"] for name in WORLD}
    assert [flips[name]["value"] for name in ("informative", "inverted", "first")] == [0, 0, 1]
    assert flips["noise"]["low"] < 0.5 < flips["noise"]["high"]
    assert [name for name in WORLD if found[name]["position_decides"]] == ["first"]
    assert found["first"]["first_picks"]["value"] == 1
    assert found["informative"]["log_loss_saved"]["low"] > 0
    assert found["inverted"]["log_loss_saved"]["high"] < 0
    assert found["informative"]["accuracy_added"]["low"] > 0
    table = "\n".join(ranking_lines(result))
    assert "simultaneous over all 4 principles" in table
    assert "not shown (the interval contains chance); single answers follow the position" in table


def test_the_log_loss_saved_is_that_of_the_pooled_label() -> None:
    row = pref(0, ("a", "ab", 0.9), ("a", "ba", 0.1), ("b", "ab", 0.5), ("b", "ba", 0.5), human="chosen")
    saved = by_id(ranking([row]))["a"]["log_loss_saved"]
    assert saved["value"] == pytest.approx(0.336472)  # ln(0.7 / 0.5)
    assert (saved["low"], saved["high"]) == pytest.approx((-LARGEST_LOSS, LARGEST_LOSS))  # one prompt shows nothing


def test_noise_is_called_a_finding_in_at_most_one_of_twenty_worlds() -> None:
    voters = dict.fromkeys((f"p{i}" for i in range(6)), noise)
    worlds, claims, saved = 60, 0, 0
    for seed in range(worlds):
        principles = ranking(world(40, voters, seed, per_prompt=2))["principles"]
        claims += any(p["finding"] != "not shown" for p in principles)
        saved += any(p["accuracy_added"]["low"] > 0 or p["accuracy_added"]["high"] < 0 for p in principles)
    # 5% of 60 worlds are 3; 8 or more have a probability of 1.2%.
    assert claims <= 7
    assert saved <= 7


def test_few_prompts_show_nothing_however_many_pairs_they_have() -> None:
    rows = world(120, {"right": with_accuracy(1.0), "other": noise}, seed=1, per_prompt=30)
    right = by_id(ranking(rows))["right"]
    assert right["agreement_human"]["value"] == 1
    assert (right["finding"], right["reason"]) == ("not shown", "too few prompts: 4 of the 9 that the claim needs")


def test_votes_in_one_order_do_not_agree_with_the_panel_by_their_position() -> None:
    rows = [pref(i, ("a", "ab", 0.9), ("b", "ab", 0.9), p_chosen=0.9) for i in range(30)]
    result = ranking(rows)
    assert (result["reference"], result["panel"]) == (None, None)
    assert "nothing to compare with" in "\n".join(ranking_lines(result))


def lines(rows: list[Preference]) -> list[dict[str, Any]]:
    return [row.model_dump() for row in rows]


def test_other_judges_are_matched_by_content_whichever_reply_they_prefer(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"human": None}) for row in world(200, WORLD, seed=5)]
    truth = world(200, WORLD, seed=5)
    labels = write_rows(tmp_path / "labels.jsonl", lines(rows))
    judged = []
    for row in truth:
        right = row.human == "chosen"
        sides = (row.chosen, row.rejected) if right else (row.rejected, row.chosen)
        judged.append({**row.model_dump(), "id": f"other-{row.id}", "human": None, "p_chosen": 0.8}
                      | {"chosen": [m.model_dump() for m in sides[0]], "rejected": [m.model_dump() for m in sides[1]]})  # fmt: skip
    panel = write_rows(tmp_path / "panel.jsonl", judged)
    result = rank_files(str(labels), panel=[str(panel)])
    assert (result["reference"], result["panel"]) == ("panel", "judges")
    found = by_id(result)
    assert [found[name]["finding"] for name in WORLD] == ["agrees", "disagrees", "not shown", "not shown"]
    assert found["informative"]["log_loss_saved"]["low"] > 0


def test_human_labels_may_come_from_a_second_file_of_pairs(tmp_path: Path) -> None:
    truth = world(60, {"right": with_accuracy(1.0), "other": noise}, seed=3)
    rows = [row.model_copy(update={"human": None}) for row in truth]
    labels = write_rows(tmp_path / "labels.jsonl", lines(rows))
    plain = [
        {"prompt": row.prompt[0].content, "chosen": one[0].content, "rejected": other[0].content}
        for row in truth
        for one, other in [(row.chosen, row.rejected) if row.human == "chosen" else (row.rejected, row.chosen)]
    ]
    human = write_rows(tmp_path / "human.jsonl", plain)
    result = rank_files(str(labels), str(human))
    assert result["reference"] == "human"
    assert by_id(result)["right"]["agreement_human"]["value"] == 1


def test_pairs_rejected_with_their_votes_count(tmp_path: Path) -> None:
    rows = world(40, WORLD, seed=4)
    labels = write_rows(tmp_path / "labels.jsonl", lines(rows[:25]))
    rejected = [reject(row.id, "under --min-confidence", row).model_dump(by_alias=True) for row in rows[25:]]
    write_rows(tmp_path / "labels.jsonl.rejected.jsonl", rejected)
    assert rank_files(str(labels)) == ranking(rows)
