"""`cai critique`: the drawn principle and refused inputs."""

from pathlib import Path

from conftest import Cai
from helpers import rows_in
from reviser_cases import PRINCIPLES, Recorder, reviser, row

from cai_cli.constitution.draw import draw
from cai_cli.data.schema import Critique, Revision
from cai_cli.phase1_supervised.critique import critique
from cai_cli.phase1_supervised.revise import revise
from cai_cli.prompting.base import assistant, user


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
        {
            "round": 1,
            "principle_id": principle.id,
            "critique": "too short",
            "response": "reply 0 to 1",
            "finish_reason": "stop",
            "thoughts": None,
        }
    ]
    talk = [user("question 1"), assistant("reply 0 to 1"), user(principle.critique)]
    assert [a.text for a in engine.requests] == [talk, [*talk, assistant("too short"), user(principle.revision)]]


def test_a_critique_where_a_sample_is_expected_is_refused_with_the_stage_that_takes_it(cai: Cai, inputs: Path) -> None:
    model = ("--model", "scripted:script.jsonl")
    assert cai("critique", "samples.jsonl", "-o", "c.jsonl", *model).code == 0
    for stage in ("critique", "critique-revise", "label-prefs"):
        refused = cai(stage, "c.jsonl", *model)
        assert (refused.code, refused.error) == (1, "wrong-row-type")
        assert "`cai revise` takes critiques" in refused.stderr
    refused = cai("revise", "samples.jsonl", *model)
    assert (refused.code, refused.error) == (1, "invalid-row")


def test_only_the_requested_principles_are_used(cai: Cai, inputs: Path) -> None:
    words = ("critique", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "c.jsonl", "--overwrite")
    assert cai(*words, "--principles", "stay-lawful,no-insults").code == 0
    assert {r["principle_id"] for r in rows_in(inputs / "c.jsonl")} == {"stay-lawful", "no-insults"}
    assert cai(*words, "--max-principles", "1").code == 0
    assert {r["principle_id"] for r in rows_in(inputs / "c.jsonl")} == {"avoid-harm"}
