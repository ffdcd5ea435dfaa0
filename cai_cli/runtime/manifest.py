"""The sidecar of an output, `OUT.manifest.json`: how it was made, from which inputs, and how many rows it has.

`provenance` is what decides the content: a partial output is only resumed, and a finished one only recognised, when
it is equal. Everything that may change without changing a row is under `run`. Names that earlier versions used are
translated by `common.legacy`.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from cai_cli import __version__
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically
from cai_cli.common.legacy import changed_between, current_manifest, current_provenance, same_value
from cai_cli.data.jsonl import COMPRESSED
from cai_cli.models.template_date import FIELD

Json = Any
NOT_LINES = (".parquet", ".json", ".csv", ".tsv")  # whose rows are not lines
# In a manifest or run.json.
OBJECTS = frozenset({"provenance", "counts", "reply_ends", "run", "metrics", "steps", "planned"})


@dataclass(frozen=True)
class InputFile:
    """An input file, hashed before the run.

    Attributes:
        name: The file as named on the command line.
        sha256: The hash of its bytes in hex; None for stdin, pipes and hf://.
        lines: The number of its lines; None where it is not known before reading, or the file is compressed.
    """

    name: str
    sha256: str | None
    lines: int | None

    @property
    def is_pipe(self) -> bool:
        """Whether it can only be read once."""
        return self.sha256 is None and not self.name.startswith("hf://")


def hash_input(source: str) -> InputFile:
    """Read `source` for its hash and its number of lines. Stdin, hf:// and pipes are not read.

    Raises:
        CaiError: `cannot-read`.
    """
    if source == "-" or source.startswith("hf://") or Path(source).is_fifo() or Path(source).is_char_device():
        return InputFile(source, None, None)
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with open(source, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise CaiError(f"cannot read {source}: {error.strerror}", code="cannot-read") from error
    lines += last != b"\n"  # the last line may lack its newline
    plain = Path(source).suffix not in {*COMPRESSED, *NOT_LINES}
    return InputFile(source, digest.hexdigest(), lines if plain else None)


def provenance(stage: str, *, inputs: Mapping[str, InputFile], settings: Mapping[str, Json], **parts: Json) -> Json:
    """The part of a manifest that decides the content. `parts`: model, constitution ... each with its fingerprint."""
    hashes = {name: file.sha256 for name, file in inputs.items()}
    return {"stage": stage, "cai": __version__, "input": hashes, "settings": dict(settings), **parts}


def differences(recorded: Json, current: Json) -> list[str]:
    """The values in which two provenances differ, each as `settings.seed: 0 -> 7`. Old names are translated first."""
    old, new = dict(_leaves(current_provenance(recorded))), dict(_leaves(current_provenance(current)))
    return [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if not same_value(name, old.get(name), new.get(name))
    ]


def unfinished_differences(recorded: Json, current: Json) -> list[str]:
    """`differences`, and what a finished output need not match: the versions where the stage writes other rows in one
    than in the other, and a date of the chat template that an earlier version did not record."""
    found, (one, other) = differences(recorded, current), (recorded["cai"], current["cai"])
    dates = template_dates(recorded)
    found += [f"{name}: not recorded -> {day}" for name, day in template_dates(current).items() if name not in dates]
    if changed_between(current["stage"], one, other):
        found.append(f"cai: {one} -> {other}, which changed what {current['stage']} writes")
    return found


def template_dates(provenance: Json) -> dict[str, str]:
    """The dates that the chat templates of a run's models wrote, by the name of the value in its provenance."""
    return {name: day for name, day in _leaves(current_provenance(provenance)) if name.endswith(f".{FIELD}")}


def _leaves(value: Json, name: str = "") -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _short(value: Json) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"


def run_facts(seconds: float, inputs: Mapping[str, InputFile]) -> Json:
    """Facts about a run that do not affect its rows: command line, time, versions, names of the inputs."""
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


def read_manifest(path: Path, hint: str = "--overwrite starts from scratch") -> Json | None:
    """The manifest at `path`, or None where there is none. Its keys have today's names, except in `provenance`.

    Args:
        path: The file.
        hint: What to do about one that cannot be read.

    Raises:
        CaiError: `invalid-manifest`, when it is not a JSON object of objects.
    """
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CaiError(f"{path}: not a readable manifest ({error})", hint, code="invalid-manifest") from error
    if isinstance(value, dict):
        value = current_manifest(value)
    parts = [value, *(value[name] for name in OBJECTS & value.keys())] if isinstance(value, dict) else [value]
    if not all(isinstance(part, dict) for part in parts):
        raise CaiError(f"{path}: not a readable manifest (not a JSON object)", hint, code="invalid-manifest")
    return value


def write_json(path: Path, value: Json) -> None:
    """Replace the JSON file `path` atomically. Raises CaiError `cannot-write`."""
    write_atomically(path, [orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"])
