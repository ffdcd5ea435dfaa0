"""The arithmetic of labels: orders averaged, votes turned to the chosen reply, a liking for a place no preference."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from hypothesis import given
from hypothesis import strategies as st
from stage_helpers import manifest_of, rows_in, sample_row, write_rows

from cai_cli.constitution import PreferencePrinciple
from cai_cli.engines.base import Engine, Question, Refusal
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.phase2_feedback.label_prefs import Labeller, Order, Pair, first_share, label_prefs
from cai_cli.prompts import assistant, user
from cai_cli.records import Preference, Rejected

PRINCIPLE = PreferencePrinciple(id="kind", comparison="Which is kinder?")


class Judge(ScriptedEngine):
    """Answers each question with the next of its log-probabilities."""

    def __init__(self, *answers: list[float] | Refusal) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    def score(self, questions: Sequence[Question]) -> list[list[float] | Refusal]:
        self.asked += questions
        return [self.answers.pop(0) for _ in questions]


def pair(number: int = 0) -> Pair:
    return Pair(id=f"p{number}/0-1", prompt=[user("q")], a=[assistant("left")], b=[assistant("right")], source="s")


def label(judge: Engine, orders: tuple[Order, ...] = ("ab", "ba"), pairs: int = 1) -> list[Preference | Rejected]:
    return label_prefs([pair(i) for i in range(pairs)], Labeller(judge, [PRINCIPLE], [], "raw", orders, 0))


def logs(p: float) -> list[float]:
    """Unnormalised log-probabilities that give the first option the share `p`."""
    return [math.log(p) - 3, math.log(1 - p) - 3]


def test_both_orders_are_asked_and_averaged_and_votes_are_turned_to_the_chosen_reply() -> None:
    # First asked left-right: left gets 0.6. Then right-left: right gets 0.9, so left 0.1. Left: 0.35, right wins.
    judge = Judge(logs(0.6), logs(0.9))
    (row,) = label(judge)
    assert isinstance(row, Preference)
    assert (row.chosen[0].content, row.rejected[0].content) == ("right", "left")
    assert row.p_chosen == pytest.approx(0.65)
    # "ab": the chosen reply stood first.
    assert [(v.order, round(v.p_first, 9)) for v in row.votes] == [("ba", 0.6), ("ab", 0.9)]
    assert {(v.principle_id, v.method, v.rationale) for v in row.votes} == {("kind", "choice", None)}
    first, second = (str(q.text) for q in judge.asked)
    assert first.index("[[[left]]]") < first.index("[[[right]]]")
    assert second.index("[[[right]]]") < second.index("[[[left]]]")
    assert all(q.options == ("A", "B") and q.cue.endswith("(") for q in judge.asked)


@given(st.floats(0.001, 0.999))
def test_a_judge_that_only_likes_a_position_never_makes_a_preference(p: float) -> None:
    (row,) = label(Judge(logs(p), logs(p)))
    assert isinstance(row, Rejected)
    assert row.reason == "tie"
    assert json.loads(row.row)["id"] == row.key == "p0/0-1"


@given(st.lists(st.tuples(*[st.lists(st.floats(-900, 0), min_size=2, max_size=2)] * 2), min_size=1), st.booleans())
def test_the_chosen_reply_has_at_least_one_half_and_the_votes_say_why(
    answers: list[tuple[list[float], list[float]]], both: bool
) -> None:
    orders: tuple[Order, ...] = ("ab", "ba") if both else ("ab",)
    rows = label(Judge(*(x for two in answers for x in two[: len(orders)])), orders, len(answers))
    assert [row.key for row in rows] == [f"p{i}/0-1" for i in range(len(answers))]
    for row in rows:
        if isinstance(row, Preference):
            assert 0.5 <= row.p_chosen <= 1
            assert len(row.votes) == len(orders)
            shares = [v.p_first if v.order == "ab" else 1 - v.p_first for v in row.votes]
            assert math.fsum(shares) / len(shares) == pytest.approx(row.p_chosen, abs=1e-12)
        else:
            assert row.reason == "tie"


@given(st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_shares_are_probabilities_that_sum_to_one(a: float, b: float) -> None:
    assert 0 <= first_share([a, b]) <= 1
    assert first_share([a, b]) + first_share([b, a]) == pytest.approx(1)


def test_a_refusal_in_either_order_rejects_the_pair_with_its_reason() -> None:
    rows = label(Judge(logs(0.9), Refusal("too long"), logs(0.9), logs(0.2)), pairs=2)
    assert isinstance(rows[0], Rejected)
    assert rows[0].reason == "too long"
    assert isinstance(rows[1], Preference)


# --- the command ------------------------------------------------------------------------------------------------------


def run(cai: Cai, folder: Path, samples: list[dict[str, object]], *more: str) -> dict[str, object]:
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    done = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl", *more)
    assert done.code == 0, done.stderr
    return manifest_of(folder / "prefs.jsonl")["counts"]  # type: ignore[no-any-return]


def test_all_pairs_of_the_replies_to_a_prompt_are_compared(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [sample_row(1, k) for k in range(4)], "--one-order")
    assert (counts["in"], counts["out"]) == (6, 6)
    assert [row["id"] for row in rows_in(tmp_path / "prefs.jsonl")] == [
        f"p1/{pair}" for pair in ("0-1", "0-2", "0-3", "1-2", "1-3", "2-3")
    ]


def test_a_single_reply_and_identical_replies_are_skipped_and_counted(cai: Cai, tmp_path: Path) -> None:
    same = [sample_row(2, k, "same") for k in range(2)]
    counts = run(cai, tmp_path, [sample_row(1), *same, *(sample_row(3, k) for k in range(2))], "--one-order")
    assert counts["skipped_reasons"] == {"only one reply to the prompt": 1, "identical replies": 1}
    assert (counts["in"], counts["out"], counts["skipped"]) == (3, 1, 2)


def test_by_default_a_constant_judge_gives_ties_and_no_preference(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [sample_row(1, k) for k in range(2)])
    assert (counts["out"], counts["rejected_reasons"]) == (0, {"tie": 1})


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([(1, 0), (1, 1), (2, 0), (2, 1), (1, 2)], "samples.jsonl:5: more replies to 'p1', after those of line 1"),
        ([(1, 0), (1, 1), (1, 0)], "samples.jsonl:3: 'p1/0' stands on line 1 already"),
    ],
)
def test_replies_that_stand_apart_or_twice_are_an_error_with_both_lines(
    order: list[tuple[int, int]], said: str, cai: Cai, tmp_path: Path
) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(*which) for which in order])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    refused = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl")
    assert refused.code == 1
    assert said in refused.stderr
