"""A finished output can grow: the same command with a larger `--limit`, or with an input that gained rows at its end.

The rows that are there stay as they are; only the new ones are requested. The run checks that the rows of the input
that the output was made from are unchanged before it requests anything (`RowReader.expect`), and the manifest records
each earlier state under `grown`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_cli.runtime.manifest import read_manifest, unfinished_differences
from cai_cli.runtime.output_files import sidecar

Json = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """What a run needs to know of the finished output that it extends.

    Attributes:
        provenance: What the larger output records: as before, with the new limit and the new hash of the input.
        rows: The count and SHA-256 of the rows that the output was made from.
        grown: The earlier states of the output, for the manifest.
        usage: The usage of the engine so far, or None.
    """

    provenance: Json
    rows: Json
    grown: list[Json]
    usage: Json | None

    def draft(self) -> Json:
        """The manifest while the output grows."""
        usage = {"usage": self.usage} if self.usage else {}
        return {"status": "running", "provenance": self.provenance, "grown": self.grown, **usage}


def growth_of(path: Path, current: Json, role: str) -> Growth | None:
    """How the finished output `path` grows into that of the run `current`; None where it does not.

    Args:
        path: The output.
        current: The provenance of the run.
        role: The role of the input that may have gained rows.
    """
    manifest = read_manifest(sidecar(path, "manifest.json")) if path.exists() else None
    if manifest is None or not {"count", "sha256"} <= (manifest.get("rows") or {}).keys():
        return None
    recorded = manifest["provenance"]
    if (larger := with_larger_limit(recorded, current)) is None:
        return None
    if current["input"].get(role) and recorded["input"].get(role):  # a pipe has no hash, and is read only once
        larger = {**larger, "input": {**larger["input"], role: current["input"][role]}}
    if larger == recorded or unfinished_differences(larger, current):
        return None
    state = {
        "rows": manifest["rows"],
        "limit": recorded["settings"].get("limit"),
        "input": recorded["input"],
        "counts": {name: manifest["counts"][name] for name in ("in", "out", "rejected", "skipped")},
        "finished_at": manifest["run"].get("finished_at"),
        "grown_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    grown = [*manifest.get("grown", []), state]
    return Growth(larger, manifest["rows"], grown, manifest["run"].get("usage"))


def with_larger_limit(recorded: Json, current: Json) -> Json | None:
    """`recorded` with the limit of `current`; None where that limit is smaller."""
    old, new = recorded["settings"].get("limit"), current["settings"].get("limit")
    if old == new:
        return recorded
    if old is None or (new is not None and new < old):
        return None
    return {**recorded, "settings": {**recorded["settings"], "limit": new}}


def expected_rows(draft: Mapping[str, Any] | None) -> Json | None:
    """The rows with which the input of a growing output must start; None where the output does not grow."""
    grown = (draft or {}).get("grown")
    return grown[-1]["rows"] if grown else None
