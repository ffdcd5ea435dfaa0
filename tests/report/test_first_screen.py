"""The top of the page: what the run changed, three prompts by a fixed rule, and the time of each step."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import Page, drawn, squeezed
from report_run import HOSTILE, make_run


def estimate(value: float, low: float, high: float, n: int = 56) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


OUTCOME = {
    "start": "start", "final": "rl-cai", "judge": "some/judge",
    "replies": {"start": "samples.jsonl", "rl-cai": "after.jsonl"},
    "win_rate": estimate(0.71, 0.61, 0.79, 106),
    "refusals_red_team": {"before": estimate(0.02, 0, 0.09), "after": estimate(0.5, 0.37, 0.63), "change": estimate(0.48, 0.34, 0.61)},
    "refusals_helpful": {"before": estimate(0.02, 0, 0.1), "after": estimate(0.04, 0.01, 0.13), "change": estimate(0.02, -0.04, 0.1)},
    "cut_off": {"before": estimate(0.9, 0.8, 0.95), "after": estimate(0.05, 0.01, 0.1)},
    "words": {"before": 35.25, "after": 22.5}, "seen_in_training": 1,
}  # fmt: skip


def with_outcome(folder: Path, outcome: Any) -> Path:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"outcome": outcome}))
    return folder


def overview(page: Page) -> str:
    return squeezed(page.text).partition(" Row counts ")[0]


def test_the_first_screen_shows_the_outcome_with_its_intervals(tmp_path: Path) -> None:
    text = overview(drawn(with_outcome(make_run(tmp_path / "made"), OUTCOME))[1])
    assert (
        "the replies of rl-cai win 71% of comparisons with those of start, 50% of red-team prompts are refused" in text
    )
    assert "no change in refusals of helpful prompts is shown" in text
    assert "71% 95%: 61% to 79%, n = 106" in text
    assert "Decided by judge . A tie counts half. Replies have 22.5 words on average; those of start have 35.2" in text
    assert "Red-team prompts change: +34 to +61 points start 2% 0% to 9%, n = 56 rl-cai 50% 37% to 63%, n = 56" in text
    assert "Prompts that were trained on and are left out of these figures: 1." in text


def test_three_prompts_are_shown_by_the_rule_that_the_page_states(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "made")
    rows: list[Any] = []
    for name in ("samples.jsonl", "after.jsonl"):
        kept = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in kept[5:]:
            row["kind"] = "helpful"
        kept[0]["finish_reason"] = "length" if name == "samples.jsonl" else "stop"
        if name == "after.jsonl":
            for place in (1, 3, 4, 5):
                kept[place]["completion"][-1]["content"] = f"I'm sorry, but I won't help with number {place}."
            rows = kept
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = overview(drawn(with_outcome(folder, OUTCOME))[1])
    shown = [row["id"] for row in rows if f" {squeezed(row['completion'][0]['content'])} " in text]
    assert shown == ["p0", "p1", "p6"]
    captions = "3 red-team prompts that rl-cai refuses", "2 red-team prompts that rl-cai does not refuse"
    places = [text.index(f"One of {each} ") for each in (*captions, "24 helpful prompts that rl-cai does not refuse")]
    assert places == sorted(places)
    assert "the first that the final model refuses and the first that it does not" in text
    assert "Cut off at the length limit: 1 of 30 replies of start, 0 of 30 replies of rl-cai." in text


def test_a_run_without_an_outcome_shows_prompts_and_the_time_of_each_step(plain: tuple[str, Page]) -> None:
    text = overview(plain[1])
    assert "The same prompts before and after" in text
    assert "What each step took 1.5 min in total samples sample 13 s" in text
    assert "Win rate" not in text
    assert "win " not in text


def test_an_outcome_of_wins_alone_makes_a_page_and_prompts_that_were_trained_on_are_not_shown(tmp_path: Path) -> None:
    wins = {name: OUTCOME[name] for name in ("start", "final", "judge", "replies", "win_rate")}
    text = overview(drawn(with_outcome(make_run(tmp_path / "made"), wins))[1])
    assert "71% 95%: 61% to 79%, n = 106" in text
    assert "words on average" not in text
    seen = drawn(with_outcome(make_run(tmp_path / "seen"), wins | {"seen_prompts": ["p0", "p1"]}))[1]
    assert "Cut off at the length limit: 0 of 28 replies of start, 0 of 28 replies of rl-cai." in overview(seen)


@pytest.mark.parametrize(
    "given", [{"outcome": OUTCOME | {"replies": {}}}, {"outcome": OUTCOME | {"replies": {"start": "a\0b", "rl-cai": "x" * 300}}},
              {"steps": {"a": None, "b": 1, "c": {"argv": [1]}, "d": {"seconds": "abc"}}, "planned": {"q": None}}],
)  # fmt: skip
def test_odd_files_are_problems_of_the_page(tmp_path: Path, given: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "made")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | given))
    for name in ("dir.compare.json", "dir.adherence.json", "dir.bench.json"):
        (folder / name).mkdir()
    odd, sound = {"value": 1, "low": 1, "high": 2, "n": None}, {"value": 0.5, "low": 0.1, "high": 0.9, "n": 3}
    (folder / "x.json").write_text(json.dumps({"a": odd, "b": sound}))
    groups = {group: {"refusal": dict.fromkeys(sound, "text")} for group in ("safe", "unsafe")}
    (folder / "x.refusals.json").write_text(json.dumps({"refusals": groups}))
    assert overview(drawn(folder)[1])


def test_an_outcome_that_cannot_be_read_and_missing_replies_are_problems_of_the_page(tmp_path: Path) -> None:
    text = overview(drawn(with_outcome(make_run(tmp_path / "made"), {"win_rate": "high"}))[1])
    assert "`outcome` is not what `cai run` writes" in text
    folder = with_outcome(make_run(tmp_path / "gone"), OUTCOME)
    (folder / "after.jsonl").unlink()
    assert "after.jsonl" in overview(drawn(folder)[1])


def test_hostile_names_in_an_outcome_are_text(tmp_path: Path) -> None:
    hostile = OUTCOME | {"final": HOSTILE[0], "judge": HOSTILE[2]}
    page, parsed = drawn(with_outcome(make_run(tmp_path / "made", hostile=True), hostile))
    assert len(parsed.named("script")) == 1
    assert not parsed.named("img")
    assert "\x00" not in page
