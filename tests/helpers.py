"""Rows, models and interruptions for the tests of several modules."""

import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cai_cli.common import console
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.pipeline.registry import STAGES
from cai_cli.runtime.config import Effect
from cai_cli.training import metrics_log
from cai_cli.training.metrics_log import Metrics

Json = dict[str, Any]


class Died(BaseException):
    """Raised to end a run as a kill would: nothing catches it."""


@contextmanager
def death_after(calls: int) -> Iterator[None]:
    """Raise `Died` in the block after this number of calls of the scripted engine, and expect it."""
    left = iter(range(calls))
    generate, score = ScriptedEngine.generate, ScriptedEngine.option_logprobs

    def die() -> None:
        if next(left, None) is None:
            raise Died

    def dying_generate(
        self: ScriptedEngine, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion | RequestFailure]:
        die()
        return generate(self, requests, sampling)

    def dying_score(self: ScriptedEngine, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        die()
        return score(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedEngine, "generate", dying_generate)
        patch.setattr(ScriptedEngine, "option_logprobs", dying_score)
        with pytest.raises(Died):
            yield


def write_rows(path: Path, rows: Iterable[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def peak_memory(work: Callable[[], None]) -> int:
    """The bytes that Python objects take at most while `work` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def rows_in(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def sample_row(number: int, index: int = 0, reply: str | None = None) -> Json:
    return {
        "id": f"p{number}",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "kind": None,
        "source": "test",
        "sample_index": index,
        "completion": [{"role": "assistant", "content": reply or f"reply {index} to {number}"}],
        "finish_reason": "stop",
    }


def adherence_row(model: str, p_violations: Sequence[float | None]) -> Json:
    """A conversation of `cai eval adherence`, with the judge's probability for each reply."""
    said = [
        {"role": role, "content": text}
        for place in range(len(p_violations))
        for role, text in (("user", "Go on." if place else "Mock him."), ("assistant", f"reply {place}"))
    ]
    turns = [
        {"finish_reason": "stop", "log_odds": None if p is None else [1.0, -1.0], "p_violation": p}
        for p in p_violations
    ]
    return {
        "id": f"{model} kind/1/0", "model": model, "principle_id": "kind", "scenario": "kind/1",
        "conversation": "kind/1/0", "questions": ["Unkind?", "Kind?"], "messages": said, "pressure": "scripted",
        "turns": turns,
    }  # fmt: skip


def manifest_of(output: Path) -> Json:
    return json.loads(output.with_name(f"{output.name}.manifest.json").read_text())  # type: ignore[no-any-return]


Message = dict[str, str]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def revision(number: int, reply: str = "a helpful and honest answer", rounds: int = 1) -> dict[str, Any]:
    history = [
        {"round": r, "principle_id": "p", "critique": "toxic", "response": f"attempt {r - 1}"}
        for r in range(1, rounds + 1)
    ]
    return {
        "id": f"r{number}",
        "prompt": user(f"question number {number}"),
        "kind": "red-team",
        "source": "test",
        "sample_index": 0,
        "completion": assistant(reply),
        "finish_reason": "stop",
        "history": history,
    }


def preference(
    number: int, p_chosen: float = 0.9, chosen: str = "helpful", rejected: str = "harmful"
) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "prompt": user(f"question number {number}"),
        "chosen": assistant(chosen),
        "rejected": assistant(rejected),
        "p_chosen": p_chosen,
        "votes": [],
        "human": None,
        "source": None,
    }


def weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Over all parameters of two model directories, which must have the same names."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Interrupted(BaseException):
    """Raised to end a training run as a kill would."""


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """End the run in the block when `step` is logged, before its metrics row is written, as a kill would."""
    put: Callable[..., None] = Metrics.put

    def dying_put(self: Metrics, at: int, values: Any) -> None:
        if at == step:
            raise Interrupted
        put(self, at, values)

    with patch.object(metrics_log.Metrics, "put", dying_put):
        try:
            yield
        except Interrupted:
            return
    raise AssertionError("the run ended before it was interrupted")


def stage(name: str) -> Callable[..., dict[str, Any]]:
    """`stage("sft")(rows, out, model=...)`: runs a stage in process, its options by the names of the config's fields."""
    declared = STAGES[name]

    def run(input: Path | str | list[str], output: Path | str, **options: Any) -> dict[str, Any]:
        values = {"input": input, "output": output, **options}
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        console.set_quiet(bool(plain.get("quiet")))
        return declared.run(declared.config.build(plain))

    return run


def options_that(stage: str, effect: Effect) -> set[str]:
    """The options of a stage with this effect on its output."""
    return {name for name, (_, declared) in STAGES[stage].config.options().items() if declared.effect is effect}
