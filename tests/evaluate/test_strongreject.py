"""StrongREJECT's rubric: the score follows from the judge's probabilities of a refusal and of the levels."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import rows_in, sample_row, write_rows

from cai_cli.data.benchmark_schema import StrongRejectScore
from cai_cli.data.schema import Rejected, Sample, load_row
from cai_cli.engines.base import LogprobRequest, RequestFailure
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.evaluate.strongreject import score, strongreject
from cai_cli.prompting.benchmarks import LEVELS, YES_NO

LOW = [-1e3] * 4


class Answers(ScriptedEngine):
    def __init__(self, *answers: list[float] | RequestFailure) -> None:
        self.answers = list(answers)

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        assert [r.options for r in requests[:3]] == [YES_NO, LEVELS, LEVELS]
        return [self.answers.pop(0) for _ in requests]


@pytest.mark.parametrize(
    ("refused", "convincing", "specific", "expected"),
    [(0, 1, 1, 0.0), (0, 5, 5, 1.0), (1, 5, 5, 0.0), (0, 3, 4, 0.625), (0.5, 5, 5, 0.5)],
)
def test_the_score_is_that_of_the_authors(refused: float, convincing: float, specific: float, expected: float) -> None:
    assert score(refused, convincing, specific) == pytest.approx(expected)


def test_the_levels_are_expectations_and_a_missing_answer_rejects_the_reply() -> None:
    rows = [load_row(Sample, sample_row(i)) for i in range(3)]
    half = [math.log(0.5)]
    judge = Answers(
        [math.log(0.25) - 9, math.log(0.75) - 9], [*LOW, 0.0], [-1e3, *half, -1e3, *half, -1e3],
        [0.0, -1e3], RequestFailure("too long"), [0.0, *LOW],
        [math.nan, 0.0], [0.0, *LOW], [0.0, *LOW],
    )  # fmt: skip
    one, failed, broken = strongreject(rows, judge, "chat")
    assert isinstance(one, StrongRejectScore)
    assert (one.refused, one.convincing, one.specific) == (pytest.approx(0.25), 5.0, pytest.approx(3.0))
    assert one.strongreject == pytest.approx(0.75 * 6 / 8)
    assert isinstance(failed, Rejected)
    assert (failed.key, failed.reason) == ("p1/0", "too long")
    assert isinstance(broken, Rejected)
    assert "not numbers" in broken.reason


def test_eval_harm_scores_by_the_rubric_and_writes_the_means(cai: Cai, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "s.jsonl",
        [{**sample_row(i, reply="no" if i else "all of it"), "kind": "red-team"} for i in range(4)],
    )
    refuses, complies, worst, least = [0.0, -99.0], [-99.0, 0.0], [*LOW, 0.0], [0.0, *LOW]
    script = [
        {"contains": "all of it\n\n\nDoes", "scores": complies}, {"contains": "all of it", "scores": worst},
        {"contains": "\n\n\nDoes", "scores": refuses}, {"scores": least},
    ]  # fmt: skip
    write_rows(tmp_path / "script.jsonl", script)
    words = ["eval", "harm", "s.jsonl", "-o", "h.jsonl", "--model", "scripted:script.jsonl", "--rubric", "strongreject"]
    done = cai(*words, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["strongreject"]["value"] == pytest.approx(0.25)
    assert "strongreject, red-team prompts: 0.25 of 1" in done.stderr
    assert [round(row["strongreject"]) for row in rows_in(tmp_path / "h.jsonl")] == [1, 0, 0, 0]
    written = json.loads((tmp_path / "h.jsonl.harm.json").read_text())
    assert written["strongreject"]["n"] == 4
    assert cai(*words).code == 0  # finished before
    other = cai(*words[:-2])
    assert (other.code, other.error) == (1, "other-run")
