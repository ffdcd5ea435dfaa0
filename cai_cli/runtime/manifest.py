"""The sidecar of an output, `OUT.manifest.json`: what made it, from what, and how much of it.

`provenance` is what decides the content: a partial output is only continued, and a finished one only taken as done,
when it is equal. Everything that may change without changing a row stands under `run`.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from cai_cli import __version__
from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import COMPRESSED

Json = Any
OBJECTS = frozenset({"provenance", "counts", "run", "figures", "steps"})  # in a manifest or run.json


@dataclass(frozen=True)
class InputFile:
    """An input as it was hashed before the run. `sha256` is null for stdin, pipes and hf://; `lines` counts newlines,
    null where it is compressed."""

    name: str
    sha256: str | None
    lines: int | None

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read once only."""
        return self.sha256 is None and not self.name.startswith("hf://")


def hash_input(source: str) -> InputFile:
    """Read `source` once for its hash and its number of lines; stdin, hf:// and pipes cannot be read twice."""
    if source == "-" or source.startswith("hf://") or Path(source).is_fifo() or Path(source).is_char_device():
        return InputFile(source, None, None)
    digest, lines = hashlib.sha256(), 0
    try:
        with open(source, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
    except OSError as error:
        raise CaiError(f"cannot read {source}: {error.strerror}") from error
    plain = Path(source).suffix not in COMPRESSED and not source.endswith(".parquet")
    return InputFile(source, digest.hexdigest(), lines if plain else None)


def provenance(stage: str, *, inputs: Mapping[str, InputFile], settings: Mapping[str, Json], **parts: Json) -> Json:
    """The content-deciding part of a manifest. `parts`: model, constitution ... each with its fingerprint."""
    hashes = {name: file.sha256 for name, file in inputs.items()}
    return {"stage": stage, "cai": __version__, "input": hashes, "settings": dict(settings), **parts}


def differences(recorded: Json, wanted: Json) -> list[str]:
    """Each leaf in which two provenances differ, as `name: recorded -> wanted`."""
    old, new = dict(_leaves(recorded)), dict(_leaves(wanted))
    return [
        f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _leaves(value: Json, name: str = "") -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(value: Json) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"


def run_facts(seconds: float, inputs: Mapping[str, InputFile]) -> Json:
    """What is worth knowing about the run but decides no row: command line, time, versions, input names."""
    from importlib.metadata import version

    return {
        "argv": ["cai", *sys.argv[1:]],
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "inputs": {name: file.name for name, file in inputs.items()},
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "transformers", "trl", "datasets")},
        },
    }


def read_manifest(path: Path) -> Json | None:
    """The manifest at `path`, or None where there is none. Raises CaiError when it is no JSON object of objects."""
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CaiError(f"{path}: not a readable manifest ({error})", hint="--overwrite starts afresh") from error
    parts = [value, *(value[name] for name in OBJECTS & value.keys())] if isinstance(value, dict) else [value]
    if not all(isinstance(part, dict) for part in parts):
        raise CaiError(f"{path}: not a readable manifest (not a JSON object)", hint="--overwrite starts afresh")
    return value


def write_json(path: Path, value: Json) -> None:
    """Write `value` so that `path` holds the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CaiError(f"cannot write {path}: {error.strerror}") from error
