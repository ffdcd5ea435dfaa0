"""Pairs, and engines that answer by what they read, for the tests of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import Cai
from helpers import manifest_of, rows_in, write_rows

from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.data.schema import Pair
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.judging.judge import Judge
from cai_cli.prompting.base import assistant, user

PRINCIPLE = PreferencePrinciple(id="kind", comparison="Which is kinder?")


def left_right(number: int = 0) -> Pair:
    return Pair(
        id=f"p{number}/0-1", prompt=[user("q")], a=[assistant("left")], b=[assistant("right")], human=None, source="s"
    )


def judge_of(engine: Engine, method: str = "choice", **settings: Any) -> Judge:
    return Judge(engine, method, [], "raw", 0, Sampling(), **settings)


def run(cai: Cai, folder: Path, samples: list[dict[str, object]], *more: str) -> dict[str, object]:
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    done = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl", *more)
    assert done.code == (not rows_in(folder / "prefs.jsonl")), done.stderr  # 1 where all pairs are rejected
    return manifest_of(folder / "prefs.jsonl")["counts"]  # type: ignore[no-any-return]


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


MANY = [PreferencePrinciple(id=f"rule{i}", comparison=f"By rule {i}?") for i in range(5)]


def human(number: int) -> dict[str, object]:
    start = f"\n\nHuman: question {number}\n\nAssistant: "
    return {"chosen": f"{start}good {number}", "rejected": f"{start}bad {number}"}
