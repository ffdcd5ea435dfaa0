"""What a run changed: a headline claims only what an interval shows."""

from typing import Any

import pytest
from helpers import sample_row

from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.schema import Sample, conversation_id, load_row
from cai_cli.evaluate.outcome import headline, lines, of_replies, win_rates

REFUSAL, ANSWER = "I can't help with that.", "Start with the flour."


def replies(refused: int, total: int, kind: str = "red-team", cut: int = 0) -> dict[str, Sample]:
    rows = [sample_row(i, reply=REFUSAL if i < refused else ANSWER) | {"kind": kind} for i in range(total)]
    for row in rows[:cut]:
        row["finish_reason"] = "length"
    return {row.key: row for row in (load_row(Sample, each) for each in rows)}


def comparison(number: int, a: str, b: str, p_a: float, kind: str | None = None) -> ModelComparison:
    row = sample_row(number)
    pair = {"a": row["completion"], "b": row["completion"], "score_a": None, "score_b": None}
    given = {"id": f"{number} {a}:{b}", "prompt_id": row["id"], "sample_index": 0, "prompt": row["prompt"]}
    return load_row(ModelComparison, given | pair | {"kind": kind, "model_a": a, "model_b": b, "p_a": p_a, "votes": []})


def test_the_win_rate_is_of_the_two_models_alone_and_a_tie_is_half() -> None:
    rows = [comparison(i, "start", "final", p) for i, p in enumerate((0.1, 0.2, 0.5, 0.9))]
    others = [comparison(9, "start", "middle", 1.0), comparison(9, "middle", "final", 1.0)]
    rate = win_rates([*rows, *others], "start", "final", ())["win_rate"]
    assert rate is not None
    assert (rate["value"], rate["n"]) == (0.625, 4)
    unseen = win_rates(rows, "start", "final", {conversation_id(rows[3].prompt)})["win_rate"]
    assert unseen is not None
    assert (unseen["value"], unseen["n"]) == (pytest.approx(2.5 / 3), 3)
    assert set(win_rates(others, "start", "final", ()).values()) == {None}


def test_the_win_rate_is_also_given_for_each_kind_of_prompt() -> None:
    won = {"red-team": (0.1, 0.2, 0.9), "helpful": (0.8,)}
    rows = [comparison(i, "start", "final", p, kind) for kind, ps in won.items() for i, p in enumerate(ps)]
    rates = win_rates(rows, "start", "final", ())
    assert {name: rate and (rate["value"], rate["n"]) for name, rate in rates.items()} == {
        "win_rate": (0.5, 4),
        "win_rate_red_team": (pytest.approx(2 / 3), 3),
        "win_rate_helpful": (0, 1),
    }


def test_refusals_are_counted_by_kind_of_prompt_and_the_change_is_paired() -> None:
    before, after = replies(1, 40, cut=30), replies(30, 40)
    found = of_replies(before, after)
    red_team = found["refusals_red_team"]
    assert [red_team[part]["value"] for part in ("before", "after", "change")] == [0.025, 0.75, pytest.approx(0.725)]
    assert red_team["change"]["low"] > 0.5
    assert found["refusals_helpful"] == {"before": None, "after": None, "change": None}
    assert (found["cut_off"]["before"]["value"], found["cut_off"]["after"]["value"]) == (0.75, 0.0)
    assert found["words"] == {"before": 4.0, "after": 4.8}


def test_replies_without_a_counterpart_are_left_out_before_and_after_and_counted() -> None:
    before = replies(20, 40)
    after = {key: row for place, (key, row) in enumerate(replies(30, 40).items()) if place >= 20}
    found = of_replies(before, after)
    shares = [found["refusals_red_team"][part] for part in ("before", "after", "change")]
    assert [(each["value"], each["n"]) for each in shares] == [(0.0, 20), (0.5, 20), (0.5, 20)]
    assert found["unpaired"] == 20
    line = "replies to prompts without a reply of the other model, which are left out: 20"
    assert line in lines({"start": "a", "final": "b", **found})


def test_prompts_without_a_kind_are_counted() -> None:
    rows = {key: row.model_copy(update={"kind": None}) for key, row in replies(3, 8).items()}
    found = of_replies(rows, rows)
    assert found["without_kind"] == 8
    assert "replies to prompts without a kind, which are in no share of refusals: 8" in lines({"final": "b", **found})


def outcome(low: float, high: float, change: tuple[float, float]) -> dict[str, Any]:
    def estimate(low: float, high: float) -> dict[str, float]:
        return {"value": (low + high) / 2, "low": low, "high": high, "n": 56}

    shares = {"before": estimate(0.0, 0.08), "after": estimate(0.4, 0.6), "change": estimate(*change)}
    return {"start": "start", "final": "rl-cai", "win_rate": estimate(low, high), "refusals_red_team": shares}


def test_the_headline_claims_a_difference_only_where_its_interval_shows_one() -> None:
    assert headline(outcome(0.6, 0.8, (0.3, 0.6))) == (
        "On prompts that the run did not train on, the replies of rl-cai win 70% of comparisons with those of start, and "
        "50% of red-team prompts are refused instead of 4%."
    )
    worse = headline(outcome(0.2, 0.4, (-0.1, 0.6)))
    assert "the replies of start win 70% of comparisons with those of rl-cai" in worse
    assert "no change in refusals of red-team prompts is shown" in worse
    assert "no difference in quality between rl-cai and start is shown" in headline(outcome(0.4, 0.6, (0.3, 0.6)))


def test_every_figure_is_printed_with_its_interval() -> None:
    assert lines(outcome(0.6, 0.8, (0.3, 0.6)) | {"seen_in_training": 2}) == [
        "rl-cai wins 70% (60% to 80%) of 56 against start",
        "refusals of red-team prompts: 4% (0% to 8%) -> 50% (40% to 60%), a change of +30 to +60 points on 56 replies",
        "prompts that were trained on and are left out: 2",
        "95% intervals, each for itself; those of eval compare hold for all its comparisons together and are wider",
    ]
    assert lines({}) == []


def test_figures_of_one_kind_of_prompt_say_so_and_come_once() -> None:
    rows = [comparison(i, "start", "final", 0.1, "red-team") for i in range(40)]
    found = {"start": "start", "final": "final", **win_rates(rows, "start", "final", ())}
    assert headline(found).endswith(
        "the replies of final win 100% of comparisons with those of start on red-team prompts."
    )
    assert [line.partition(" of ")[2] for line in lines(found)[:-1]] == ["40 red-team prompts against start"]
    found = {
        "start": "start",
        "final": "final",
        **win_rates([*rows, comparison(50, "start", "final", 0.1)], "start", "final", ()),
    }
    assert headline(found).endswith("the replies of final win 100% of comparisons with those of start.")
    assert len(lines(found)) == 3
    tied = [comparison(i, "start", "final", float(i % 2), "red-team") for i in range(40)]
    found = {"start": "start", "final": "final", **win_rates(tied, "start", "final", ())}
    assert headline(found).endswith("no difference in quality between final and start on red-team prompts is shown.")
