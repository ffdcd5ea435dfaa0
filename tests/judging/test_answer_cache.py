from pathlib import Path

from helpers import rows_in

from cai_cli.data.reward_schema import CriterionAnswer, JudgedReplies
from cai_cli.judging.answer_cache import AnswerCache


def judged(reply: str, *, ends_batch: bool) -> JudgedReplies:
    answers = [CriterionAnswer(criterion_id="kind", log_odds=[0.1 + len(reply), -1 / 3])]
    return JudgedReplies(id="p", prompt_hash="h", replies=[reply], answers=answers, ends_batch=ends_batch)


def test_answers_are_read_again_to_the_bit(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "judge.jsonl")
    cache.add([judged("one", ends_batch=False), judged("three", ends_batch=True)])
    cache.close()
    again = AnswerCache(tmp_path / "judge.jsonl")
    assert len(again) == 2
    assert again.answer("kind", "h", ["three"]) == (0.1 + 5, -1 / 3)
    for unknown in (("brief", "h", ["one"]), ("kind", "g", ["one"]), ("kind", "h", ["on", "e"])):
        assert again.answer(*unknown) is None


def test_a_batch_that_a_kill_cut_short_is_asked_again_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "judge.jsonl"
    cache = AnswerCache(file)
    cache.add([judged("one", ends_batch=True)])
    cache.add([judged("two", ends_batch=False), judged("three", ends_batch=True)])
    cache.close()
    whole = file.read_bytes()
    for end in (len(whole) - 1, len(whole) - 60, whole.rindex(b"\n", 0, -1) + 1):
        file.write_bytes(whole[:end])
        again = AnswerCache(file)
        assert [again.answer("kind", "h", [reply]) is None for reply in ("one", "two", "three")] == [False, True, True]
        assert [row["replies"] for row in rows_in(file)] == [["one"]]
