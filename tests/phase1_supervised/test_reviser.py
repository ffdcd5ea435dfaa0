"""Rounds of critique and revision: draws, history and rejected rows."""

from helpers import sample_row
from reviser_cases import PRINCIPLES, Recorder, reviser, row

from cai_cli.constitution.draw import draw
from cai_cli.data.schema import Rejected, Revision, Sample
from cai_cli.engines.base import RequestFailure
from cai_cli.phase1_supervised.critique_revise import critique_revise


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
