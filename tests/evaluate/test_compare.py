"""Models compared on the same prompts: which replies are joined, who wins, and with what interval."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows

from cai_cli.common.errors import InvalidRow, UsageError
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.row_types import row_key
from cai_cli.data.schema import Kind, Rejected, Sample, load_row
from cai_cli.engines.base import LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.evaluate.compare import ReplyPair, compare_by_votes, name_files, print_result, reply_pairs
from cai_cli.judging.base import sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.votes import Labeller
from cai_cli.prompting.evaluation import HELPFULNESS
from cai_cli.runtime.stage_run import Skipped, WorkItem

PRINCIPLE = PreferencePrinciple(id="kind", comparison="Which is kinder?")


def samples(folder: Path, name: str, replies: dict[int, str], kind: str | None = "red-team") -> str:
    rows = [{**sample_row(number, reply=reply), "kind": kind} for number, reply in replies.items()]
    return str(write_rows(folder / f"{name}.jsonl", rows))


def test_a_comparison_is_identified_by_its_prompt_sample_and_models() -> None:
    row = match(0, "a", "b").comparison(0.5)
    assert row_key(row.model_dump()) == row.key == "p0/0 x:y"


# --- pairing the replies ------------------------------------------------------------------------------------------


def test_models_are_joined_by_prompt_and_one_that_lacks_a_reply_is_skipped_and_counted(tmp_path: Path) -> None:
    files = {
        "x": samples(tmp_path, "x", {1: "x1", 2: "x2"}),
        "y": samples(tmp_path, "y", {2: "y2", 1: "y1"}),
        "z": samples(tmp_path, "z", {1: "z1", 3: "z3"}),
    }
    units = list(reply_pairs(files, None, None))
    matches = [u.value for u in units if isinstance(u, WorkItem)]
    assert [(m.id, m.a.reply, m.b.reply) for m in matches] == [
        ("p1/0 x:y", "x1", "y1"), ("p1/0 x:z", "x1", "z1"), ("p1/0 y:z", "y1", "z1"), ("p2/0 x:y", "x2", "y2"),
    ]  # fmt: skip
    assert [u.reason for u in units if isinstance(u, Skipped)] == [
        "no reply of z", "no reply of z", "no reply of x or y", "no reply of x", "no reply of y",
    ]  # fmt: skip
    assert len(units) == 3 * 3
    assert len(list(reply_pairs(files, None, 1))) == 3


def test_only_prompts_of_one_kind_are_compared_and_the_others_are_counted(tmp_path: Path) -> None:
    for name in "xy":
        rows = [
            sample_row(i, reply=f"{name}{i}") | {"kind": kind} for i, kind in enumerate(("red-team", "helpful", None))
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in "xy"}
    units = list(reply_pairs(files, "red-team", None, "red-team"))
    assert [u.value.a.reply for u in units if isinstance(u, WorkItem)] == ["x0", "x2"]  # --kind is that of the third
    assert [u.reason for u in units if isinstance(u, Skipped)] == ["the prompt is helpful, not red-team"]
    units = list(reply_pairs(files, None, 1, "helpful"))  # --limit counts the prompts of this kind
    assert [u.value.a.reply for u in units if isinstance(u, WorkItem)] == ["x1"]
    skipped = [u.reason for u in units if isinstance(u, Skipped)]
    assert skipped == ["the prompt is red-team, not helpful", "the prompt is of no kind, not helpful"]


def test_a_kind_comes_from_any_file_that_has_one_and_two_kinds_are_an_error(tmp_path: Path) -> None:
    none, known = samples(tmp_path, "none", {1: "a"}, None), samples(tmp_path, "known", {1: "b"}, "helpful")
    for files in ({"x": none, "y": known}, {"y": known, "x": none}):
        (unit,) = reply_pairs(files, "red-team", None)
        assert isinstance(unit, WorkItem)
        assert unit.value.kind == "helpful"
    other = samples(tmp_path, "other", {1: "c"}, "red-team")
    with pytest.raises(InvalidRow, match="is red-team here and helpful in another file"):
        list(reply_pairs({"x": none, "y": known, "z": other}, None, None))


def test_an_id_with_different_prompts_is_an_error_with_its_line(tmp_path: Path) -> None:
    x = samples(tmp_path, "x", {1: "a", 2: "b"})
    other = {**sample_row(2), "prompt": [{"role": "user", "content": "something else"}]}
    y = str(write_rows(tmp_path / "y.jsonl", [sample_row(1), other]))
    with pytest.raises(InvalidRow) as error:
        list(reply_pairs({"x": x, "y": y}, None, None))
    assert (error.value.code, error.value.file, error.value.line) == ("invalid-row", y, 2)
    twice = str(write_rows(tmp_path / "twice.jsonl", [sample_row(1), sample_row(1)]))
    with pytest.raises(InvalidRow) as error:
        list(reply_pairs({"x": x, "twice": twice}, None, None))
    assert (error.value.code, error.value.file, error.value.line) == ("duplicate-id", twice, 2)


def test_models_are_named_by_their_files_or_explicitly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_files(["runs/start.jsonl.zst", "better=runs/sl cai.jsonl"]) == {
        "start": "runs/start.jsonl.zst", "better": "runs/sl cai.jsonl",
    }  # fmt: skip
    # As `cai run` names the outputs of a sweep.
    assert list(name_files(["out/rev@rounds=1.jsonl", "rev@rounds=2.jsonl"])) == ["rev@rounds=1", "rev@rounds=2"]
    (tmp_path / "a=b").write_text("")
    assert name_files(["a=b", "odd name.jsonl"]) == {"a=b": "a=b", "odd-name": "odd name.jsonl"}
    with pytest.raises(UsageError) as usage:
        name_files(["one/x.jsonl", "two/x.jsonl"])
    assert usage.value.code == "option-conflict"
    with pytest.raises(UsageError) as usage:
        name_files(["x.jsonl"])
    assert usage.value.code == "missing-option"


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


# --- the command --------------------------------------------------------------------------------------------------


def compare(cai: Cai, folder: Path, *more: str) -> Json:
    for name, word in (("start", "rude words"), ("better", "kind words")):
        samples(folder, name, {i: f"{word} {i}" for i in range(12)})
    write_rows(folder / "script.jsonl", [{"contains": "(A) [[[kind", "scores": [-0.1, -3.0]}, {"scores": [-3.0, -0.1]}])
    done = cai("eval", "compare", "start.jsonl", "better.jsonl", "-o", "c.jsonl", "--judge", "scripted:script.jsonl",
               "--prompt-format", "raw", "--few-shot", "none", *more)  # fmt: skip
    assert done.code == 0, done.stderr
    return {"stdout": done.stdout, "stderr": done.stderr}


def test_the_command_writes_rows_metrics_and_words(cai: Cai, tmp_path: Path) -> None:
    stderr = compare(cai, tmp_path)["stderr"]
    assert "red-team prompts: better is better than start: better wins 100%" in stderr
    rows = rows_in(tmp_path / "c.jsonl")
    assert len(rows) == 12
    assert {row["p_a"] < 0.5 for row in rows} == {True}
    metrics = json.loads((tmp_path / "c.jsonl.compare.json").read_text())
    assert list(metrics) == ["models", "win_rates", "ratings", "scores", "simultaneous"]
    assert metrics["models"] == ["start", "better"]
    assert list(metrics["ratings"]) == ["harmless", "helpful"]
    assert list(metrics["ratings"]["harmless"][0]) == ["model", "value", "low", "high", "n"]
    assert set(metrics["win_rates"][0]) == {"a", "b", "kind", "value", "low", "high", "n", "ties", "prompts"}
    assert manifest_of(tmp_path / "c.jsonl")["counts"]["out"] == 12
    (tmp_path / "c.jsonl.compare.json").unlink()
    again = compare(cai, tmp_path, "--json")
    summary = json.loads(again["stdout"])
    assert summary["status"] == "already finished"
    assert {name: summary[name] for name in metrics} == metrics
    assert json.loads((tmp_path / "c.jsonl.compare.json").read_text()) == metrics


def test_an_interval_that_contains_one_half_shows_no_improvement(cai: Cai, tmp_path: Path) -> None:
    samples(tmp_path, "x", {i: "good" if i % 2 else "bad" for i in range(8)})
    samples(tmp_path, "y", {i: "bad" if i % 2 else "good" for i in range(8)})
    write_rows(tmp_path / "s.jsonl", [{"contains": "(A) [[[good", "scores": [0.0, -3.0]}, {"scores": [-3.0, 0.0]}])
    done = cai("eval", "compare", "x.jsonl", "y.jsonl", "-o", "c.jsonl", "--judge", "scripted:s.jsonl",
               "--few-shot", "none")  # fmt: skip
    assert done.code == 0, done.stderr
    assert "no significant difference between x and y: x wins 50%" in done.stderr
    assert "is better" not in done.stderr


def test_few_prompts_and_simultaneous_intervals_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rate = {"kind": "red-team", "value": 1.0, "low": 0.4, "high": 1.0, "n": 9, "ties": 0, "prompts": 9}
    rates = [rate | {"a": a, "b": b} for a, b in (("x", "y"), ("x", "z"), ("y", "z"))]
    result = {"win_rates": rates, "ratings": {}, "simultaneous": {"win_rates": 3, "ratings": 3, "scores": 0}}
    print_result(result)
    stderr = capsys.readouterr().err
    assert "red-team prompts: 9 prompts are too few to compare x and y (10 are needed): x wins 100%" in stderr
    assert "the 95% intervals are simultaneous over 3 win rates, over 3 ratings" in stderr
    print_result(result | {"win_rates": [rates[0]], "simultaneous": {"win_rates": 1, "ratings": 1, "scores": 0}})
    stderr = capsys.readouterr().err
    assert "no significant difference between x and y" in stderr
    assert "simultaneous" not in stderr


def test_rows_can_go_down_a_pipe_with_the_metrics_on_stderr(cai: Cai, tmp_path: Path) -> None:
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
def test_exactly_one_of_pm_and_judge_is_required(judges: list[str], cai: Cai) -> None:
    done = cai("eval", "compare", "x.jsonl", "y.jsonl", *judges)
    assert (done.code, done.error) == (2, "option-conflict")


def test_a_preference_model_s_scores_decide_and_are_kept(cai: Cai, tmp_path: Path) -> None:
    from tiny import tiny_model_dir

    from cai_cli.models.loading import load_reward_model, load_tokenizer
    from cai_cli.prompting.base import assistant, user
    from cai_cli.reward.preference_model import score_conversations

    base = tiny_model_dir(tmp_path / "base")
    load_reward_model(base, new_head_seed=3).save_pretrained(tmp_path / "pm")
    load_tokenizer(base).save_pretrained(tmp_path / "pm")
    model, tokenizer = load_reward_model(tmp_path / "pm"), load_tokenizer(tmp_path / "pm")
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
    metrics = json.loads((tmp_path / "c.jsonl.compare.json").read_text())
    means = {s["model"]: (s["value"], s["n"]) for s in metrics["scores"]["harmless"]}
    assert means["x"][1] == 4
    assert means["y"][1] == 3
    of_x = {row["prompt_id"]: row["score_a"] for row in rows if row["model_a"] == "x"}
    assert means["x"][0] == pytest.approx(sum(of_x.values()) / 4)
    options = ("-o", "c.jsonl", "--pm", "pm", "--overwrite", "--dtype")
    assert cai("eval", "compare", "x.jsonl", "y.jsonl", *options, "int8").error == "option-conflict"
    assert cai("eval", "compare", "x.jsonl", "y.jsonl", *options, "bfloat16").code == 0
    assert manifest_of(tmp_path / "c.jsonl")["provenance"]["settings"]["pm_dtype"] == "bfloat16"
    coarse = [row["score_a"] for row in rows_in(tmp_path / "c.jsonl")]
    fine = [row["score_a"] for row in rows if (row["model_a"], row["model_b"]) == ("x", "y")]
    assert coarse == pytest.approx(fine, abs=0.05)
    assert coarse != pytest.approx(fine, abs=1e-5)
