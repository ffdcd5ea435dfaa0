"""Rows, models and interruptions for the tests of the training stages."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson

from cai_cli.training import metrics_log
from cai_cli.training.metrics_log import Metrics

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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads(output.with_name(f"{output.name}.manifest.json").read_text(encoding="utf-8"))


def weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Over all parameters of two model directories, which must have the same names."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Interrupted(BaseException):
    """Stands for the kill."""


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """The run inside stops as by a kill when `step` is logged, before its metrics row is written."""
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
