"""The scripted engine answers with the first line that matches, and fails a request that it has no answer to."""

from pathlib import Path

import pytest
from helpers import write_rows

from cai_cli.common.errors import CaiError, InvalidRow
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine


def test_the_first_matching_line_answers_and_the_seed_chooses_the_reply(tmp_path: Path) -> None:
    script = [{"contains": "boat", "replies": ["a", "b"], "finish_reason": "length"}, {"replies": ["c"]}]
    engine = ScriptedEngine(str(write_rows(tmp_path / "s.jsonl", script)))
    requests = [GenerationRequest(text, seed) for text, seed in (("a boat", 0), ("a boat", 3), ("a car", 3))]
    assert engine.generate(requests, Sampling()) == [
        Completion("a", "length"), Completion("b", "length"), Completion("c", "stop"),
    ]  # fmt: skip


def test_a_request_without_an_answer_fails_and_the_others_are_answered(tmp_path: Path) -> None:
    script = [{"contains": "boat", "scores": [-1.0, -2.0]}]
    engine = ScriptedEngine(str(write_rows(tmp_path / "s.jsonl", script)))
    requests = [
        LogprobRequest("a boat", ("A", "B")),
        LogprobRequest("a boat", ("A", "B", "C")),
        LogprobRequest("x", ("A", "B")),
    ]
    first, *others = engine.option_logprobs(requests)
    assert first == [-1.0, -2.0]
    assert all(isinstance(other, RequestFailure) for other in others)
    assert isinstance(engine.generate([GenerationRequest("a boat", 0)], Sampling())[0], RequestFailure)


def test_an_empty_script_and_an_unknown_field_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        ScriptedEngine(str(write_rows(tmp_path / "empty.jsonl", [])))
    assert error.value.code == "no-rows"
    file = str(write_rows(tmp_path / "s.jsonl", [{"replies": ["a"]}, {"reply": "b"}]))
    with pytest.raises(InvalidRow) as invalid:
        ScriptedEngine(file)
    assert (invalid.value.file, invalid.value.line) == (file, 2)
