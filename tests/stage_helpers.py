"""Rows and scripts for the tests of the data stages."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


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
