"""Rows and scripts for the tests of the data stages."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cai_cli.engines.base import Ask, Question, Refusal, Reply, Sampling
from cai_cli.engines.scripted import ScriptedEngine

Json = dict[str, Any]


class Died(BaseException):
    """Caught by nothing: the process is as good as killed."""


@contextmanager
def death_after(calls: int) -> Iterator[None]:
    """What runs within dies after so many calls of the scripted engine, and must."""
    left = iter(range(calls))
    generate, score = ScriptedEngine.generate, ScriptedEngine.score

    def die() -> None:
        if next(left, None) is None:
            raise Died

    def dying_generate(self: ScriptedEngine, asks: Sequence[Ask], sampling: Sampling) -> list[Reply | Refusal]:
        die()
        return generate(self, asks, sampling)

    def dying_score(self: ScriptedEngine, questions: Sequence[Question]) -> list[list[float] | Refusal]:
        die()
        return score(self, questions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedEngine, "generate", dying_generate)
        patch.setattr(ScriptedEngine, "score", dying_score)
        with pytest.raises(Died):
            yield


def write_rows(path: Path, rows: Iterable[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def manifest_of(output: Path) -> Json:
    return json.loads(output.with_name(f"{output.name}.manifest.json").read_text())  # type: ignore[no-any-return]
