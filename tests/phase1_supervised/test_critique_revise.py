"""Critique and revision: the requests, the checks of answers, and the history of a row."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows

from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.draw import draw
from cai_cli.constitution.schema import CritiqueExample, CritiquePrinciple
from cai_cli.data.schema import Critique, Prompt, Rejected, Revision, Sample, load_row
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.critique import critique
from cai_cli.phase1_supervised.critique_revise import critique_revise
from cai_cli.phase1_supervised.format_checks import ATTEMPTS, generate_checked
from cai_cli.phase1_supervised.revise import revise
from cai_cli.phase1_supervised.reviser import Reviser
from cai_cli.phase1_supervised.sample import sample
from cai_cli.prompting.base import assistant, user

PRINCIPLES = [CritiquePrinciple(id=i, critique=f"Critique by {i}.", revision=f"Revise by {i}.") for i in "abcd"]


class Recorder:
    """Answers with the next of its texts and records its requests."""

    batch_size = 64

    def __init__(self, *texts: str | RequestFailure) -> None:
        self.texts, self.requests = list(texts), list[GenerationRequest]()

    def identity(self) -> dict[str, object]:
        return {}

    def supports_chat(self) -> bool:
        return True

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        self.requests += requests
        texts = [self.texts.pop(0) for _ in requests]
        return [t if isinstance(t, RequestFailure) else Completion(t, "stop") for t in texts]

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        raise NotImplementedError


def reviser(engine: Recorder, temperature: float = 1.0, examples: Sequence[CritiqueExample] = ()) -> Reviser:
    return Reviser(engine, PRINCIPLES, examples, "chat", Sampling(temperature=temperature), seed=5)


def row(number: int = 1, index: int = 0) -> Sample:
    return load_row(Sample, sample_row(number, index))


# --- answers that are sampled again ------------------------------------------------------------------------------------


def bad(_index: int, text: str) -> str | None:
    return "bad text" if text == "bad" else None


def test_only_failed_answers_are_sampled_again_with_another_seed_and_the_same_prompt() -> None:
    engine = Recorder("fine", "bad", "bad", "good", "bad", "better")
    requests = [GenerationRequest(f"text {i}", seed_for(i), "cue", ("stop",)) for i in range(3)]
    answers = generate_checked(engine, requests, Sampling(), bad)
    assert [a.text for a in answers if isinstance(a, Completion)] == ["fine", "good", "better"]
    assert [a.text for a in engine.requests] == ["text 0", "text 1", "text 2", "text 1", "text 2", "text 2"]
    assert len({a.seed for a in engine.requests}) == 6
    assert {(a.prefill, a.stop) for a in engine.requests} == {("cue", ("stop",))}


def test_an_answer_that_never_passes_is_rejected_with_the_reason_and_the_number_of_attempts() -> None:
    engine = Recorder(*["bad"] * ATTEMPTS)
    assert generate_checked(engine, [GenerationRequest("x", 1)], Sampling(), bad) == [
        RequestFailure(f"bad text, {ATTEMPTS} attempts")
    ]
    assert len(engine.requests) == ATTEMPTS


def test_a_greedy_answer_is_not_sampled_again() -> None:
    engine = Recorder("bad")
    assert generate_checked(engine, [GenerationRequest("x", 1)], Sampling(temperature=0), bad) == [
        RequestFailure("bad text, 1 attempts")
    ]


def test_a_request_failure_of_the_engine_is_final() -> None:
    assert generate_checked(Recorder(RequestFailure("too long")), [GenerationRequest("x", 1)], Sampling(), bad) == [
        RequestFailure("too long")
    ]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_sampling_gives_every_reply_its_own_seed_and_rejects_empty_replies() -> None:
    prompt = load_row(Prompt, {"id": "p", "prompt": [{"role": "user", "content": "q"}]})
    engine = Recorder(" one \n", "  ", RequestFailure("does not fit"))
    outcomes = list(sample([(prompt, i) for i in range(3)], engine, sampling=Sampling(), form="chat", seed=5))
    assert [o.key for o in outcomes] == ["p/0", "p/1", "p/2"]
    assert isinstance(outcomes[0], Sample)
    assert outcomes[0].reply == "one"
    assert [o.reason for o in outcomes if isinstance(o, Rejected)] == ["empty reply", "does not fit"]
    assert [a.seed for a in engine.requests] == [seed_for(5, "sample", "p", i) for i in range(3)]


def test_critique_and_revision_use_the_same_drawn_principle() -> None:
    engine = Recorder("too short", "a longer reply")
    (criticised,) = critique([row()], reviser(engine))
    principle = draw(PRINCIPLES, 5, "principle", "p1", 0, 1)
    assert isinstance(criticised, Critique)
    assert (criticised.principle_id, criticised.round, criticised.history) == (principle.id, 1, [])
    (revised,) = revise([criticised], reviser(engine))
    assert isinstance(revised, Revision)
    assert revised.reply == "a longer reply"
    assert [t.model_dump() for t in revised.history] == [
        {"round": 1, "principle_id": principle.id, "critique": "too short", "response": "reply 0 to 1"}
    ]
    talk = [user("question 1"), assistant("reply 0 to 1"), user(principle.critique)]
    assert [a.text for a in engine.requests] == [talk, [*talk, assistant("too short"), user(principle.revision)]]


def test_a_critique_under_a_principle_not_in_use_stops_the_run() -> None:
    stray = load_row(Critique, {**sample_row(1), "history": [], "round": 1, "principle_id": "z", "critique": "c"})
    with pytest.raises(CaiError) as error:
        revise([stray], reviser(Recorder()))
    assert error.value.code == "unknown-principle"
    assert "'p1/0'" in error.value.message


def test_each_round_revises_the_previous_revision_under_a_new_draw_and_keeps_the_history() -> None:
    engine = Recorder("c1", "r1", "c2", "r2", "c3", "r3")
    (done,) = critique_revise([row()], reviser(engine), rounds=3, with_critique=True)
    assert isinstance(done, Revision)
    assert done.reply == "r3"
    assert [(t.round, t.critique, t.response) for t in done.history] == [
        (1, "c1", "reply 0 to 1"), (2, "c2", "r1"), (3, "c3", "r2"),
    ]  # fmt: skip
    drawn = [draw(PRINCIPLES, 5, "principle", "p1", 0, n).id for n in (1, 2, 3)]
    assert [t.principle_id for t in done.history] == drawn
    assert len(set(drawn)) > 1
    assert len({a.seed for a in engine.requests}) == 6


def test_without_critique_the_revision_is_requested_directly() -> None:
    engine = Recorder("r1", "r2")
    (done,) = critique_revise([row()], reviser(engine), rounds=2, with_critique=False)
    assert isinstance(done, Revision)
    assert [(t.critique, t.response) for t in done.history] == [(None, "reply 0 to 1"), (None, "r1")]
    assert len(engine.requests) == 2


def test_a_row_that_fails_in_a_later_round_is_rejected_in_its_original_form_and_the_others_continue() -> None:
    engine = Recorder("c", "c", "r", "r", "c", RequestFailure("no room"), "last")
    good, failed = critique_revise([row(1), row(2)], reviser(engine), rounds=2, with_critique=True)
    assert isinstance(good, Revision)
    assert good.reply == "last"
    assert isinstance(failed, Rejected)
    assert (failed.key, failed.reason) == ("p2/0", "no room")
    assert failed.row == Sample.model_validate(sample_row(2)).model_dump_json()


def test_results_do_not_depend_on_other_rows() -> None:
    alone, together = Recorder("c", "r"), Recorder("c", "c", "r", "r")
    (only,) = critique_revise([row(2)], reviser(alone), rounds=1, with_critique=True)
    both = critique_revise([row(1), row(2)], reviser(together), rounds=1, with_critique=True)
    assert both[1] == only
    assert [a for a in together.requests if "question 2" in str(a.text)] == alone.requests


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(5) for k in range(2)))
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two.", "three."]}])
    return tmp_path


def test_chained_single_rounds_give_the_same_rows_as_the_loop(cai: Cai, inputs: Path) -> None:
    model = ("--model", "scripted:script.jsonl")
    for stage, source, out in (
        ("critique", "samples", "c1"),
        ("revise", "c1", "r1"),
        ("critique", "r1", "c2"),
        ("revise", "c2", "r2"),
    ):
        assert cai(stage, f"{source}.jsonl", "-o", f"{out}.jsonl", *model).code == 0
    assert cai("critique-revise", "samples.jsonl", "-o", "loop.jsonl", "--rounds", "2", *model).code == 0
    assert (inputs / "r2.jsonl").read_bytes() == (inputs / "loop.jsonl").read_bytes()
    assert cai("critique-revise", "r1.jsonl", "-o", "on.jsonl", "--rounds", "1", *model).code == 0
    assert (inputs / "on.jsonl").read_bytes() == (inputs / "loop.jsonl").read_bytes()


def test_a_critique_where_a_sample_is_expected_is_refused_with_the_stage_that_takes_it(cai: Cai, inputs: Path) -> None:
    model = ("--model", "scripted:script.jsonl")
    assert cai("critique", "samples.jsonl", "-o", "c.jsonl", *model).code == 0
    for stage in ("critique", "critique-revise", "label-prefs"):
        refused = cai(stage, "c.jsonl", *model)
        assert (refused.code, refused.error) == (1, "wrong-row-type")
        assert "`cai revise` takes critiques" in refused.stderr
    refused = cai("revise", "samples.jsonl", *model)
    assert refused.error == "invalid-row"
    assert "samples.jsonl:1: not a Critique row: field 'history' is missing" in refused.stderr


def test_only_the_requested_principles_are_used(cai: Cai, inputs: Path) -> None:
    words = ("critique", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "c.jsonl", "--overwrite")
    assert cai(*words, "--principles", "stay-lawful,no-insults").code == 0
    assert {r["principle_id"] for r in rows_in(inputs / "c.jsonl")} == {"stay-lawful", "no-insults"}
    assert cai(*words, "--max-principles", "1").code == 0
    assert {r["principle_id"] for r in rows_in(inputs / "c.jsonl")} == {"avoid-harm"}


def test_kind_is_for_rows_without_one_and_another_word_is_a_usage_error(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "p.jsonl", [{"prompt": "a", "kind": "helpful"}, {"prompt": "b"}])
    words = ("sample", "p.jsonl", "--model", "scripted:script.jsonl", "-o", "s.jsonl")
    assert cai(*words, "--kind", "red-team").code == 0
    assert [r["kind"] for r in rows_in(inputs / "s.jsonl")] == ["helpful", "red-team"]
    refused = cai(*words, "--kind", "evil")
    assert (refused.code, "--kind" in refused.stderr) == (2, True)


def test_limit_takes_the_first_rows_and_n_counts_replies(cai: Cai, inputs: Path) -> None:
    (inputs / "p.txt").write_text("one\ntwo\nthree\n")
    assert (
        cai("sample", "p.txt", "--model", "scripted:script.jsonl", "-o", "s.jsonl", "-n", "3", "--limit", "2").code == 0
    )
    rows = rows_in(inputs / "s.jsonl")
    assert [(r["prompt"][0]["content"], r["sample_index"]) for r in rows] == [
        (text, k) for text in ("one", "two") for k in range(3)
    ]
    assert manifest_of(inputs / "s.jsonl")["counts"]["in"] == 6
    assert {r["source"] for r in rows} == {"p.txt"}
