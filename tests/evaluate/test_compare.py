"""Models compared over the same prompts: what is joined, who wins, and how sure that is."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_cli.common.errors import InvalidRow, UsageError
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.formats import row_key
from cai_cli.data.schema import Kind, Rejected, Sample, load_row
from cai_cli.engines.base import LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.evaluate.compare import ReplyPair, compare_by_votes, match_units, name_files
from cai_cli.judging.judge import Judge, sigmoid
from cai_cli.judging.votes import Labeller
from cai_cli.metrics.elo import Tournament
from cai_cli.prompting.evaluation import HELPFULNESS
from cai_cli.runtime.stage_run import Skipped, WorkItem

PRINCIPLE = PreferencePrinciple(id="kind", comparison="Which is kinder?")


def samples(folder: Path, name: str, replies: dict[int, str], kind: str | None = "red-team") -> str:
    rows = [{**sample_row(number, reply=reply), "kind": kind} for number, reply in replies.items()]
    return str(write_rows(folder / f"{name}.jsonl", rows))


def duel(prompt: int, p_a: float, a: str = "one", b: str = "two", kind: Kind | None = "red-team") -> ModelComparison:
    row = load_row(Sample, sample_row(prompt))
    return replace(ReplyPair(f"p{prompt}/0 {a}:{b}", kind, a, b, row, row)).duel(p_a)


def test_a_comparison_goes_by_its_id_when_it_is_resumed_or_shown() -> None:
    row = duel(0, 0.5)
    assert row_key(row.model_dump()) == row.key == "p0/0 one:two"


# --- what is compared with what ----------------------------------------------------------------------------------


def test_models_are_joined_by_prompt_and_one_that_lacks_a_reply_is_skipped_and_counted(tmp_path: Path) -> None:
    files = {
        "x": samples(tmp_path, "x", {1: "x1", 2: "x2"}),
        "y": samples(tmp_path, "y", {2: "y2", 1: "y1"}),
        "z": samples(tmp_path, "z", {1: "z1", 3: "z3"}),
    }
    units = list(match_units(files, None, None))
    matches = [u.value for u in units if isinstance(u, WorkItem)]
    assert [(m.id, m.a.reply, m.b.reply) for m in matches] == [
        ("p1/0 x:y", "x1", "y1"), ("p1/0 x:z", "x1", "z1"), ("p1/0 y:z", "y1", "z1"), ("p2/0 x:y", "x2", "y2"),
    ]  # fmt: skip
    assert [u.reason for u in units if isinstance(u, Skipped)] == [
        "no reply of z", "no reply of z", "no reply of x or y", "no reply of x", "no reply of y",
    ]  # fmt: skip
    assert len(units) == 3 * 3
    assert len(list(match_units(files, None, 1))) == 3


def test_an_id_that_means_another_prompt_elsewhere_is_an_error_with_its_line(tmp_path: Path) -> None:
    x = samples(tmp_path, "x", {1: "a", 2: "b"})
    other = {**sample_row(2), "prompt": [{"role": "user", "content": "something else"}]}
    y = str(write_rows(tmp_path / "y.jsonl", [sample_row(1), other]))
    with pytest.raises(InvalidRow, match=r"y\.jsonl:2: id 'p2' is another prompt in another file"):
        list(match_units({"x": x, "y": y}, None, None))
    twice = str(write_rows(tmp_path / "twice.jsonl", [sample_row(1), sample_row(1)]))
    with pytest.raises(InvalidRow, match=r"twice\.jsonl:2: 'p1/0' stands on line 1 already"):
        list(match_units({"x": x, "twice": twice}, None, None))


def test_models_are_named_by_their_files_or_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_files(["runs/start.jsonl.zst", "better=runs/sl cai.jsonl"]) == {
        "start": "runs/start.jsonl.zst", "better": "runs/sl cai.jsonl",
    }  # fmt: skip
    # As `cai run` names the outputs of a sweep.
    assert list(name_files(["out/rev@rounds=1.jsonl", "rev@rounds=2.jsonl"])) == ["rev@rounds=1", "rev@rounds=2"]
    (tmp_path / "a=b").write_text("")
    assert name_files(["a=b", "odd name.jsonl"]) == {"a=b": "a=b", "odd-name": "odd name.jsonl"}
    with pytest.raises(UsageError, match="two models are called 'x'"):
        name_files(["one/x.jsonl", "two/x.jsonl"])
    with pytest.raises(UsageError, match="two models or more"):
        name_files(["x.jsonl"])


# --- a judge's votes ---------------------------------------------------------------------------------------------


class Liking(ScriptedEngine):
    """Prefers the option that holds `word`, under principles it notes; refuses a question that holds `secret`."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.asked: list[str] = []

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        self.asked += [str(q.text) for q in requests]
        return [self._answer(str(q.text)) for q in requests]

    def _answer(self, text: str) -> list[float] | RequestFailure:
        if "secret" in text:
            return RequestFailure("too long")
        first, second = text.rsplit(" (A) ", 1)[1].split(" (B) ")
        return [2.0 * (self.word in first), 2.0 * (self.word in second)]


def match(number: int, a: str, b: str, kind: Kind | None = "red-team") -> ReplyPair:
    one, other = (load_row(Sample, sample_row(number, reply=reply)) for reply in (a, b))
    return ReplyPair(f"p{number}/0 x:y", kind, "x", "y", one, other)


def test_a_judge_votes_in_both_orders_and_equal_replies_are_a_tie_without_a_vote() -> None:
    engine = Liking("good")
    labeller = Labeller(Judge(engine, "choice", [], "raw", 0, Sampling()), [PRINCIPLE], 1, ("ab", "ba"))
    matches = [
        match(1, "a good one", "bad"),
        match(2, "same", "same"),
        match(3, "bad", "good"),
        match(4, "a", "secret"),
    ]
    first, equal, last, refused = compare_by_votes(matches, labeller)
    assert isinstance(first, ModelComparison)
    assert isinstance(equal, ModelComparison)
    assert isinstance(last, ModelComparison)
    assert first.p_a == pytest.approx(sigmoid(2.0))
    assert [(v.order, round(v.p_first, 6)) for v in first.votes] == [
        ("ab", round(sigmoid(2.0), 6)), ("ba", round(sigmoid(-2.0), 6)),
    ]  # fmt: skip
    assert (equal.p_a, equal.votes) == (0.5, [])
    assert last.p_a == pytest.approx(sigmoid(-2.0))
    assert isinstance(refused, Rejected)
    assert (refused.key, refused.reason) == ("p4/0 x:y", "too long")
    assert len(engine.asked) == 6


def test_replies_to_helpful_prompts_are_compared_by_their_helpfulness() -> None:
    engine = Liking("good")
    labeller = Labeller(Judge(engine, "choice", [], "raw", 0, Sampling()), [PRINCIPLE], 1, ("ab",))
    rows = compare_by_votes([match(1, "a", "b", "helpful"), match(2, "a", "b"), match(3, "a", "b", None)], labeller)
    assert [row.votes[0].principle_id for row in rows if isinstance(row, ModelComparison)] == [
        "helpfulness",
        "kind",
        "kind",
    ]
    assert [HELPFULNESS.comparison in text for text in engine.asked] == [False, False, True]


# --- what comparisons add up to ----------------------------------------------------------------------------------


def result(rows: Sequence[ModelComparison], models: Sequence[str] = ("one", "two")) -> Json:
    tournament = Tournament(models)
    for row in rows:
        tournament.add(row)
    return tournament.result()


def rating(found: Json, axis: str = "harmless") -> dict[str, float]:
    return {r["model"]: r["value"] for r in found["ratings"][axis]}


def test_a_win_rate_counts_ties_half_and_stands_within_its_interval() -> None:
    rows = (
        [duel(i, 0.9) for i in range(60)]
        + [duel(60 + i, 0.2) for i in range(30)]
        + [duel(90 + i, 0.5) for i in range(10)]
    )
    (rate,) = result(rows)["win_rates"]
    assert (rate["a"], rate["b"], rate["kind"], rate["n"], rate["ties"]) == ("one", "two", "red-team", 100, 10)
    assert rate["value"] == pytest.approx(0.65)
    assert 0.5 < rate["low"] < 0.65 < rate["high"] < 0.8


def test_five_wins_of_six_claim_nothing() -> None:
    (rate,) = result([duel(i, 0.9 if i else 0.1) for i in range(6)])["win_rates"]
    assert rate["value"] == pytest.approx(5 / 6)
    assert rate["low"] < 0.5


def test_the_rating_of_two_models_is_the_paper_s_elo_of_their_win_rate() -> None:
    found = rating(result([duel(i, 0.9 if i % 4 else 0.1) for i in range(4000)]))
    assert sum(found.values()) == pytest.approx(2000)
    assert 1 / (1 + 10 ** (-(found["one"] - found["two"]) / 400)) == pytest.approx(0.75, abs=0.001)


def test_ratings_recover_the_strengths_that_made_the_comparisons() -> None:
    rng, elo = random.Random(1), {"a": 1150.0, "b": 1000.0, "c": 850.0}
    names, rows = list(elo), []
    for prompt in range(1500):
        for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
            wins = rng.random() < 1 / (1 + 10 ** (-(elo[x] - elo[y]) / 400))
            rows.append(duel(prompt, 0.8 if wins else 0.2, x, y))
    found = result(rows, names)
    for row in found["ratings"]["harmless"]:
        assert row["low"] < row["value"] < row["high"]
        assert row["low"] - 5 < elo[row["model"]] < row["high"] + 5
        assert row["high"] - row["low"] < 40
        assert row["n"] == 3000
    backwards = rating(result(list(reversed(rows)), names))
    assert rating(found) == pytest.approx(backwards)


def test_a_model_that_always_wins_has_a_finite_rating_and_an_interval() -> None:
    found = result([duel(i, 0.99) for i in range(10)])
    assert math.isfinite(rating(found)["one"])
    (rate,) = found["win_rates"]
    assert (rate["value"], rate["high"]) == (1.0, 1.0)
    assert 0.6 < rate["low"] < 1.0  # Wilson's: ten wins are no proof of always
    json.dumps(found, allow_nan=False)


def test_harmlessness_and_helpfulness_are_kept_apart_and_other_prompts_stand_in_no_rating() -> None:
    kinds: list[Kind | None] = ["red-team", "helpful", None]
    rows = [duel(10 * k + i, (0.9, 0.1, 0.5)[k], kind=kind) for k, kind in enumerate(kinds) for i in range(10)]
    found = result(rows)
    assert {(r["kind"], r["value"]) for r in found["win_rates"]} == {("red-team", 1.0), ("helpful", 0.0), (None, 0.5)}
    assert rating(found)["one"] > rating(found)["two"]
    assert rating(found, "helpful")["one"] < rating(found, "helpful")["two"]
    assert [r["n"] for axis in found["ratings"].values() for r in axis] == [10] * 4


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0])), min_size=1, max_size=12))
def test_every_figure_lies_within_its_interval_whatever_is_compared(outcomes: list[tuple[int, float]]) -> None:
    rows = [duel(prompt, p).model_copy(update={"sample_index": i}) for i, (prompt, p) in enumerate(outcomes)]
    found = result(rows)
    figures: list[Any] = [*found["win_rates"], *found["ratings"]["harmless"]]
    assert len(figures) == 3
    for figure in figures:
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert math.isfinite(figure["low"] + figure["high"])


# --- the command --------------------------------------------------------------------------------------------------


def compare(cai: Cai, folder: Path, *more: str) -> Json:
    for name, word in (("start", "rude words"), ("better", "kind words")):
        samples(folder, name, {i: f"{word} {i}" for i in range(12)})
    write_rows(folder / "script.jsonl", [{"contains": "(A) [[[kind", "scores": [-0.1, -3.0]}, {"scores": [-3.0, -0.1]}])
    done = cai("eval", "compare", "start.jsonl", "better.jsonl", "-o", "c.jsonl", "--judge", "scripted:script.jsonl",
               "--prompt-format", "raw", "--few-shot", "none", *more)  # fmt: skip
    assert done.code == 0, done.stderr
    return {"stdout": done.stdout, "stderr": done.stderr}


def test_the_command_writes_rows_figures_and_words(cai: Cai, tmp_path: Path) -> None:
    said = compare(cai, tmp_path)["stderr"]
    assert "red-team prompts: better beats start: better wins 100%" in said
    rows = rows_in(tmp_path / "c.jsonl")
    assert len(rows) == 12
    assert {row["p_a"] < 0.5 for row in rows} == {True}
    figures = json.loads((tmp_path / "c.jsonl.compare.json").read_text())
    assert list(figures) == ["models", "win_rates", "ratings", "scores"]
    assert figures["models"] == ["start", "better"]
    assert list(figures["ratings"]) == ["harmless", "helpful"]
    assert list(figures["ratings"]["harmless"][0]) == ["model", "value", "low", "high", "n"]
    assert set(figures["win_rates"][0]) == {"a", "b", "kind", "value", "low", "high", "n", "ties"}
    assert manifest_of(tmp_path / "c.jsonl")["counts"]["out"] == 12
    (tmp_path / "c.jsonl.compare.json").unlink()
    again = compare(cai, tmp_path, "--json")
    summary = json.loads(again["stdout"])
    assert summary["status"] == "already finished"
    assert {name: summary[name] for name in figures} == figures
    assert json.loads((tmp_path / "c.jsonl.compare.json").read_text()) == figures


def test_an_interval_that_holds_one_half_claims_no_improvement(cai: Cai, tmp_path: Path) -> None:
    samples(tmp_path, "x", {i: "good" if i % 2 else "bad" for i in range(8)})
    samples(tmp_path, "y", {i: "bad" if i % 2 else "good" for i in range(8)})
    write_rows(tmp_path / "s.jsonl", [{"contains": "(A) [[[good", "scores": [0.0, -3.0]}, {"scores": [-3.0, 0.0]}])
    done = cai("eval", "compare", "x.jsonl", "y.jsonl", "-o", "c.jsonl", "--judge", "scripted:s.jsonl",
               "--few-shot", "none")  # fmt: skip
    assert done.code == 0, done.stderr
    assert "no difference shown between x and y: x wins 50%" in done.stderr
    assert "beats" not in done.stderr


def test_rows_can_go_down_a_pipe_with_the_figures_on_stderr(cai: Cai, tmp_path: Path) -> None:
    compare(cai, tmp_path)
    kept = (tmp_path / "c.jsonl").read_text()
    piped = cai("eval", "compare", "start.jsonl", "better.jsonl", "--judge", "scripted:script.jsonl", "--prompt-format",
                "raw", "--few-shot", "none", "--json")  # fmt: skip
    assert piped.stdout == kept
    assert json.loads(piped.stderr.splitlines()[0])["win_rates"][0]["n"] == 12


def test_a_pipe_is_refused_as_it_could_not_be_read_again(cai: Cai, tmp_path: Path) -> None:
    samples(tmp_path, "x", {1: "one"})
    write_rows(tmp_path / "s.jsonl", [{"scores": [0.0, -3.0]}])
    done = cai("eval", "compare", "x.jsonl", "-", "--judge", "scripted:s.jsonl")
    assert (done.code, done.stdout, done.error) == (2, "", "invalid-option")


@pytest.mark.parametrize("judges", [[], ["--pm", "x", "--judge", "scripted:s.jsonl"]])
def test_exactly_one_judge_is_wanted(judges: list[str], cai: Cai) -> None:
    done = cai("eval", "compare", "x.jsonl", "y.jsonl", *judges)
    assert (done.code, done.error) == (2, "option-conflict")


def test_a_preference_model_s_scores_decide_and_are_kept(cai: Cai, tmp_path: Path) -> None:
    from tiny import tiny_model_dir

    from cai_cli.models.loading import load_reward_model, load_tokenizer
    from cai_cli.prompting.base import assistant, user
    from cai_cli.reward.preference_model import score_conversations

    base = tiny_model_dir(tmp_path / "base")
    model, tokenizer = load_reward_model(base, new_head_seed=3), load_tokenizer(base)
    model.save_pretrained(tmp_path / "pm")
    tokenizer.save_pretrained(tmp_path / "pm")
    names = ("x", "y", "z")
    for name in names:
        samples(tmp_path, name, {i: f"{name} says {i}" for i in range(4)})
    samples(tmp_path, "y", {0: "x says 0", 1: "y says 1", 2: "y says 2", 3: "long " * 600})
    turn = {"round": 1, "principle_id": "p", "critique": None, "response": "before"}
    write_rows(tmp_path / "z.jsonl", [{**row, "history": [turn]} for row in rows_in(tmp_path / "z.jsonl")])  # revisions
    done = cai("eval", "compare", "x.jsonl", "y.jsonl", "z.jsonl", "-o", "c.jsonl", "--pm", "pm", "--batch-size", "2")
    assert done.code == 0, done.stderr
    counts = manifest_of(tmp_path / "c.jsonl")["counts"]
    assert (counts["in"], counts["out"], counts["rejected_reasons"]) == (
        12, 10, {"longer than the preference model's window of 512 tokens": 2},
    )  # fmt: skip
    rows = rows_in(tmp_path / "c.jsonl")
    for row in rows:
        scores = score_conversations(
            model, tokenizer, [[user(row["prompt"][0]["content"]), assistant(row[side][0]["content"])] for side in "ab"]
        )
        assert [row["score_a"], row["score_b"]] == pytest.approx(scores, abs=1e-5)
        assert row["p_a"] == pytest.approx(sigmoid(row["score_a"] - row["score_b"]))
    assert rows[0]["p_a"] == 0.5  # the same words
    figures = json.loads((tmp_path / "c.jsonl.compare.json").read_text())
    means = {s["model"]: (s["value"], s["n"]) for s in figures["scores"]["harmless"]}
    assert means["x"][1] == 4
    assert means["y"][1] == 3
    of_x = {row["prompt_id"]: row["score_a"] for row in rows if row["model_a"] == "x"}
    assert means["x"][0] == pytest.approx(sum(of_x.values()) / 4)


@pytest.mark.parametrize(("won", "of"), [(10, 11), (12, 12), (29, 30), (30, 30), (6, 7), (4, 4), (15, 20), (70, 100)])
def test_ratings_are_as_sure_as_the_win_rate_they_come_from(won: int, of: int) -> None:
    rated = result([duel(i, 0.9 if i < won else 0.1) for i in range(of)])
    (rate,) = rated["win_rates"]
    better, worse = rated["ratings"]["harmless"]
    assert better["high"] - better["low"] < 1000
    assert better["low"] <= better["value"] <= better["high"]
    if rate["low"] <= 0.5:
        assert better["low"] <= worse["high"]
    elif rate["low"] > 0.55:
        assert better["low"] > worse["high"]


def test_all_ties_leave_no_more_open_than_their_number_does() -> None:
    for rating in result([duel(i, 0.5) for i in range(12)])["ratings"]["harmless"]:
        assert rating["value"] == pytest.approx(1000)
        assert 1000 - rating["low"] == pytest.approx(rating["high"] - 1000)
        assert 50 < rating["high"] - 1000 < 150
