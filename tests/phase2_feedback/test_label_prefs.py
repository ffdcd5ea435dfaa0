"""Labels from votes: orders are averaged, votes refer to the chosen reply, and position bias gives no preference."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair, Preference, Rejected
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.base import Judgement, Order, sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.methods.choice import CONTENT_FREE
from cai_cli.judging.votes import Labeller
from cai_cli.phase2_feedback.label_prefs import label_prefs
from cai_cli.prompting.base import assistant, user
from cai_cli.prompting.comparison import fence

PRINCIPLE = PreferencePrinciple(id="kind", comparison="Which is kinder?")


class Answers(ScriptedEngine):
    """Answers each question with the next of its log-probabilities."""

    def __init__(self, *answers: list[float] | RequestFailure) -> None:
        self.answers = list(answers)
        self.asked: list[LogprobRequest] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        self.asked += requests
        return [self.answers.pop(0) for _ in requests]


def pair(number: int = 0) -> Pair:
    return Pair(
        id=f"p{number}/0-1", prompt=[user("q")], a=[assistant("left")], b=[assistant("right")], human=None, source="s"
    )


def judge_of(engine: Engine, method: str = "choice", **settings: Any) -> Judge:
    return Judge(engine, method, [], "raw", 0, Sampling(), **settings)


def label(engine: Engine, orders: tuple[Order, ...] = ("ab", "ba"), pairs: int = 1) -> list[Preference | Rejected]:
    return label_prefs([pair(i) for i in range(pairs)], Labeller(judge_of(engine), [PRINCIPLE], 1, orders))


def logs(p: float) -> list[float]:
    """Unnormalised log-probabilities that give the first option the share `p`."""
    return [math.log(p) - 3, math.log(1 - p) - 3]


def test_both_orders_are_asked_and_averaged_and_votes_are_turned_to_the_chosen_reply() -> None:
    # First asked left-right: left gets 0.6. Then right-left: right gets 0.9, so left 0.1. Left: 0.35, right wins.
    judge = Answers(logs(0.6), logs(0.9))
    (row,) = label(judge)
    assert isinstance(row, Preference)
    assert (row.chosen[0].content, row.rejected[0].content) == ("right", "left")
    assert row.p_chosen == pytest.approx(0.65)
    assert (row.id, row.source, row.prompt) == ("p0/0-1", "s", [user("q")])
    # "ab": the chosen reply stood first.
    assert [(v.order, round(v.p_first, 9)) for v in row.votes] == [("ba", 0.6), ("ab", 0.9)]
    assert {(v.principle_id, v.method, v.rationale) for v in row.votes} == {("kind", "choice", None)}
    first, second = (str(q.text) for q in judge.asked)
    assert first.index("[[[left]]]") < first.index("[[[right]]]")
    assert second.index("[[[right]]]") < second.index("[[[left]]]")
    assert all(q.options == ("A", "B") and q.prefill.endswith("(") for q in judge.asked)


@given(st.floats(0.001, 0.999))
def test_a_judge_that_only_likes_a_position_never_makes_a_preference(p: float) -> None:
    (row,) = label(Answers(logs(p), logs(p)))
    assert isinstance(row, Rejected)
    assert row.reason == "tie"
    assert json.loads(row.row)["id"] == row.key == "p0/0-1"


@given(st.lists(st.tuples(*[st.lists(st.floats(-900, 0), min_size=2, max_size=2)] * 2), min_size=1), st.booleans())
def test_the_chosen_reply_has_at_least_one_half_and_the_votes_say_why(
    answers: list[tuple[list[float], list[float]]], both: bool
) -> None:
    orders: tuple[Order, ...] = ("ab", "ba") if both else ("ab",)
    rows = label(Answers(*(x for two in answers for x in two[: len(orders)])), orders, len(answers))
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
    assert 0 <= sigmoid(a - b) <= 1
    assert sigmoid(a - b) + sigmoid(b - a) == pytest.approx(1)


def test_a_refusal_in_either_order_rejects_the_pair_with_its_reason() -> None:
    rows = label(Answers(logs(0.9), RequestFailure("too long"), logs(0.9), logs(0.2)), pairs=2)
    assert isinstance(rows[0], Rejected)
    assert rows[0].reason == "too long"
    assert isinstance(rows[1], Preference)


# --- the command ------------------------------------------------------------------------------------------------------


def run(cai: Cai, folder: Path, samples: list[dict[str, object]], *more: str) -> dict[str, object]:
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    done = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl", *more)
    assert done.code == (not rows_in(folder / "prefs.jsonl")), done.stderr  # 1 where all pairs are rejected
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
    ("order", "code", "lines"),
    [
        (
            [(1, 0), (1, 1), (2, 0), (2, 1), (1, 2)],
            "rows-out-of-order",
            (5, 1),
        ),
        ([(1, 0), (1, 1), (1, 0)], "duplicate-id", (3, 1)),
    ],
)
def test_scattered_or_repeated_replies_are_an_error_with_both_lines(
    order: list[tuple[int, int]], code: str, lines: tuple[int, int], cai: Cai, tmp_path: Path
) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(*which) for which in order])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    refused = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl")
    assert (refused.code, refused.error) == (1, code)
    assert f"samples.jsonl:{lines[0]}:" in refused.stderr
    assert f"line {lines[1]}" in refused.stderr


# --- methods, ensembles, and where pairs come from --------------------------------------------------------------------


class Reader(ScriptedEngine):
    """A judge that reads the question: `score_of(text, options)` and `say(text)` are the test's."""

    def __init__(self, score_of: Any = None, say: Any = None) -> None:
        self.score_of, self.say = score_of, say
        self.asked: list[GenerationRequest] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        return [self.score_of(f"{q.text}{q.prefill}", q.options) for q in requests]

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        self.asked += asks
        return [Completion(self.say(f"{a.text}{a.prefill}", a.seed), "stop") for a in asks]


def leaning(text: str, options: tuple[str, ...]) -> list[float]:
    """Likes the letter A by 2 nats and the reply `right` by 1."""
    blank = any(f"(A) {fence(free)}" in text for free in CONTENT_FREE)
    first_is_right = text.rindex("[[[right]]]") < text.rindex("[[[left]]]") if not blank else None
    return [2.0 + {True: 1.0, False: -1.0, None: 0.0}[first_is_right], 0.0]


def test_calibration_takes_out_the_liking_for_a_letter_and_leaves_the_preference() -> None:
    labeller = Labeller(judge_of(Reader(leaning), calibrate=True), [PRINCIPLE], 1, ("ab", "ba"))
    (row,) = label_prefs([pair()], labeller)
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx(sigmoid(1.0))
    assert sorted(v.p_first for v in row.votes) == pytest.approx([sigmoid(-1.0), sigmoid(1.0)])
    (raw,) = label_prefs([pair()], Labeller(judge_of(Reader(leaning)), [PRINCIPLE], 1, ("ab", "ba")))
    assert isinstance(raw, Preference)
    assert all(v.p_first > 0.5 for v in raw.votes)


def test_every_principle_has_its_own_liking_for_a_letter() -> None:
    """Under rule N the judge likes A by N nats, and nothing else."""
    engine = Reader(lambda text, _: [float(text[text.rindex("By rule ") + 8]), 0.0])
    labeller = Labeller(judge_of(engine, calibrate=True), MANY, 5, ("ab",))
    comparisons = list(labeller.comparisons(pair()))
    answers = labeller.judge.judge(comparisons)
    assert [a.p_first for a in answers if isinstance(a, Judgement)] == pytest.approx([0.5] * 5)


def test_a_nan_log_probability_is_not_a_vote() -> None:
    (row,) = label(Answers([math.nan, -1.0]), orders=("ab",))
    assert isinstance(row, Rejected)
    assert row.reason == "the judge's log-probabilities are not numbers"


def test_thoughts_are_kept_clamped_and_averaged() -> None:
    engine = Reader(lambda text, _: [0.0, -9.0] if "left wins" in text else [-9.0, 0.0],
                    lambda _, seed: " left wins" if seed % 2 else " right wins")  # fmt: skip
    labeller = Labeller(judge_of(engine, "cot", clamp=(0.4, 0.6)), [PRINCIPLE], 1, ("ab",), samples=5)
    (row,) = label_prefs([pair()], labeller)
    assert isinstance(row, Preference)
    assert len({ask.seed for ask in engine.asked}) == len(row.votes) == 5
    assert {v.rationale for v in row.votes} <= {"left wins", "right wins"}
    for vote in row.votes:
        assert vote.p_first == (0.6 if vote.rationale == "left wins" else 0.4)
    p_left = math.fsum(v.p_first for v in row.votes) / 5
    assert row.p_chosen == pytest.approx(max(p_left, 1 - p_left))


def test_an_empty_thought_and_an_unreadable_verdict_are_no_votes() -> None:
    for method, said in (("cot", "empty rationale"), ("verdict", "no verdict in the answer")):
        engine = Reader(lambda *_: [0.0, -1.0], lambda *_: " ")
        (row,) = label_prefs([pair()], Labeller(judge_of(engine, method), [PRINCIPLE], 1, ("ab", "ba")))
        assert isinstance(row, Rejected)
        assert row.reason == said


def test_verdicts_in_words_are_votes_of_zero_or_one() -> None:
    engine = Reader(say=lambda text, _: "(A)" if text.rindex("[[[left]]]") < text.rindex("[[[right]]]") else "(B)")
    (row,) = label_prefs([pair()], Labeller(judge_of(engine, "verdict"), [PRINCIPLE], 1, ("ab", "ba")))
    assert isinstance(row, Preference)
    assert (row.chosen[0].content, row.p_chosen) == ("left", 1.0)
    assert [(v.order, v.p_first) for v in row.votes] == [("ab", 1.0), ("ba", 0.0)]


def test_a_contrast_is_the_difference_of_the_differences() -> None:
    principle = PRINCIPLE.model_copy(update={"following": "Be kind.", "breaking": "Be rude."})
    told = {"Be kind.": [-5.0, -7.0], "Be rude.": [-4.0, -8.0]}  # left: -1, right: +1
    engine = Reader(lambda text, options: next(v for k, v in told.items() if k in text))
    (row,) = label_prefs([pair()], Labeller(judge_of(engine, "contrast"), [principle], 1, ("ab",)))
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx(sigmoid(2.0))


MANY = [PreferencePrinciple(id=f"rule{i}", comparison=f"By rule {i}?") for i in range(5)]


def by_rule(text: str, _: Any) -> list[float] | RequestFailure:
    """Rule 0 and 1 like `left`, the others `right`; rule 4 answers only when `left` stands first."""
    rule = int(text[text.rindex("By rule ") + 8])
    left_first = text.rindex("[[[left]]]") < text.rindex("[[[right]]]")
    if rule == 4 and not left_first:
        return RequestFailure("too long")
    return [1.0, 0.0] if (rule < 2) == left_first else [0.0, 1.0]


def test_votes_are_kept_per_principle_and_order_and_a_half_answered_principle_has_none() -> None:
    labeller = Labeller(judge_of(Reader(by_rule)), MANY, 5, ("ab", "ba"))
    (row,) = label_prefs([pair()], labeller)
    assert isinstance(row, Rejected)  # two against two
    assert row.reason == "tie"
    (row,) = label_prefs([pair()], Labeller(judge_of(Reader(by_rule)), MANY[1:], 4, ("ab", "ba")))
    assert isinstance(row, Preference)
    assert row.chosen[0].content == "right"
    assert row.p_chosen == pytest.approx((2 * sigmoid(1) + sigmoid(-1)) / 3)
    assert sorted((v.principle_id, v.order) for v in row.votes) == [
        (f"rule{i}", order) for i in (1, 2, 3) for order in ("ab", "ba")
    ]


@given(st.integers(1, 5), st.integers(0, 99))
def test_the_principles_of_a_pair_are_drawn_without_repetition_and_grow_with_their_number(k: int, number: int) -> None:
    def drawn(count: int) -> list[str]:
        labeller = Labeller(judge_of(Reader()), MANY, count, ("ab",))
        return [c.principle.id for c in labeller.comparisons(pair(number))]

    assert len(set(drawn(k))) == k
    assert drawn(5)[:k] == drawn(k)


def test_every_principle_is_drawn_about_equally_often() -> None:
    labeller = Labeller(judge_of(Reader()), MANY, 1, ("ab",))
    drawn = [c.principle.id for i in range(1000) for c in labeller.comparisons(pair(i))]
    assert all(150 < drawn.count(p.id) < 250 for p in MANY)


def human(number: int) -> dict[str, object]:
    start = f"\n\nHuman: question {number}\n\nAssistant: "
    return {"chosen": f"{start}good {number}", "rejected": f"{start}bad {number}"}


def test_human_pairs_are_labelled_and_record_whom_humans_preferred(cai: Cai, tmp_path: Path) -> None:
    run(cai, tmp_path, [human(i) for i in range(40)], "--one-order")  # the judge likes what stands first
    rows = rows_in(tmp_path / "prefs.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert row["human"] == ("chosen" if row["chosen"][0]["content"].startswith("good") else "rejected")
    assert 8 < sum(row["human"] == "chosen" for row in rows) < 32  # the better reply stands on either side


def test_pairs_without_a_source_have_the_name_of_their_file_without_its_folders(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "human.jsonl", [human(1)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    words = ("--model", "scripted:script.jsonl", "--one-order", "--quiet")
    (row,) = map(json.loads, cai("label-prefs", str(tmp_path / "human.jsonl"), *words).stdout.splitlines())
    assert row["source"] == "human.jsonl"
    piped = cai("label-prefs", "-", *words, stdin=(tmp_path / "human.jsonl").read_bytes())
    assert json.loads(piped.stdout)["source"] == "stdin"


def test_a_repeated_pair_is_skipped_and_not_called_a_prompt(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [human(1), human(1)], "--one-order")
    assert (counts["out"], counts["skipped_reasons"]) == (1, {"the same as an earlier line": 1})


def test_a_random_pairing_uses_no_reply_twice(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [sample_row(1, k) for k in range(5)], "--one-order", "--pairs", "random")
    assert (counts["in"], counts["skipped_reasons"]) == (3, {"no partner in a random pairing": 1})
    rows = rows_in(tmp_path / "prefs.jsonl")
    told = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    assert len(told) == len(set(told)) == 4


def test_best_vs_rest_pairs_the_reply_of_the_highest_score_with_each_other(cai: Cai, tmp_path: Path) -> None:
    scores = {1: [0.5, 2.0, -1.0, 2.0], 2: [3.0, 1.0]}
    rows = [sample_row(number, k) | {"score": x} for number, line in scores.items() for k, x in enumerate(line)]
    run(cai, tmp_path, rows, "--pairs", "best-vs-rest", "--one-order")
    assert [row["id"] for row in rows_in(tmp_path / "prefs.jsonl")] == ["p1/0-1", "p1/1-2", "p1/1-3", "p2/0-1"]


def test_best_vs_rest_needs_a_score_for_every_reply(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [sample_row(1, 0) | {"score": 1.0}, sample_row(1, 1)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    done = cai("label-prefs", "pairs.jsonl", "--model", "scripted:script.jsonl", "--pairs", "best-vs-rest")
    assert (done.code, done.error) == (1, "invalid-row")
    assert "pairs.jsonl:2: " in done.stderr
    assert "cai score" in done.stderr


def test_pairs_below_the_minimum_confidence_are_counted_and_can_be_judged_again(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [human(i) for i in range(3)], "--min-confidence", "0.6")
    assert counts["rejected_reasons"] == {"tie": 3}
    again = [json.loads(row["row"]) for row in rows_in(tmp_path / "prefs.jsonl.rejected.jsonl")]
    counts = run(cai, tmp_path, again, "--one-order", "--min-confidence", "0.95", "--overwrite")
    assert counts["rejected_reasons"] == {"under --min-confidence": 3}
    counts = run(cai, tmp_path, again, "--one-order", "--min-confidence", "0.9", "--overwrite")
    assert (counts["out"], counts["rejected"]) == (3, 0)
    relabelled = rows_in(tmp_path / "prefs.jsonl")
    run(cai, tmp_path, relabelled, "--one-order", "--overwrite")
    assert {row["id"] for row in rows_in(tmp_path / "prefs.jsonl")} == {row["id"] for row in relabelled}


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "guess"],
        ["--pairs", "some"],
        ["--clamp", "0.6,0.9"],
        ["--clamp", "x"],
        ["--principles-per-pair", "0"],
        ["--principles-per-pair", "17"],
        ["--cot-samples", "2"],
        ["--method", "cot", "--calibrate"],
        ["--method", "contrast", "--few-shot", "examples.yaml"],
    ],
)
def test_an_invalid_way_of_judging_is_a_usage_error(words: list[str], cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(1, k) for k in range(2)])
    refused = cai("label-prefs", "samples.jsonl", "--model", "scripted:none", "-o", "prefs.jsonl", *words)
    assert refused.code == 2
    assert not (tmp_path / "prefs.jsonl").exists()


def test_rejected_pairs_keep_their_votes_and_can_be_judged_again(cai: Cai, tmp_path: Path) -> None:
    run(cai, tmp_path, [sample_row(1, k) for k in range(2)])
    (tie,) = rows_in(tmp_path / "prefs.jsonl.rejected.jsonl")
    row = json.loads(tie["row"])
    assert (row["p_chosen"], [v["order"] for v in row["votes"]]) == (0.5, ["ba", "ab"])
    again = cai(
        "label-prefs", "-", "--model", "scripted:script.jsonl", "--one-order", stdin=(tie["row"] + "\n").encode()
    )
    assert (again.code, json.loads(again.stdout)["id"]) == (0, tie["key"])


def test_every_labelling_ends_with_the_audit_of_its_labels(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(i, k) for i in range(8) for k in range(2)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    words = ("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "--one-order", "--json")
    filed = cai(*words, "-o", "prefs.jsonl")
    assert "warning: do not trust these labels: the judge saw one order only, and picks the first reply in 100.0%" in (
        filed.stderr
    )
    found = json.loads(filed.stdout)
    assert (found["out"], found["audit"]["trusted"], found["audit"]["first_picks"]["value"]) == (8, False, 1)
    piped = cai(*words)
    assert json.loads(piped.stderr.splitlines()[0])["audit"] == found["audit"]
    assert (
        cai("eval", "agreement", "prefs.jsonl", "--json").stdout
        == json.dumps(found["audit"], separators=(",", ":")) + "\n"
    )


def test_a_pair_exactly_at_the_minimum_confidence_is_kept() -> None:
    engine = Reader(say=lambda text, _: "(A)" if text.rindex("[[[left]]]") < text.rindex("[[[right]]]") else "(B)")
    labeller = Labeller(judge_of(engine, "verdict"), [PRINCIPLE], 1, ("ab", "ba"), min_confidence=1.0)
    (row,) = label_prefs([pair()], labeller)
    assert isinstance(row, Preference)
    assert row.p_chosen == 1.0
