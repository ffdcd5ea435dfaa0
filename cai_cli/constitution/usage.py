"""Counts how often each principle was drawn for the rows of a file, and finds the principles used for it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError
from cai_cli.constitution.draw import select
from cai_cli.constitution.schema import (
    CritiqueConstitution,
    CritiquePrinciple,
    PreferenceConstitution,
    PreferencePrinciple,
    open_constitution,
)
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import ContrastSample, Critique, Preference, Revision, Row
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar

# Stages that draw preference principles -> the rows that they write.
ROW_TYPES: Mapping[str, type[Row]] = {"label-prefs": Preference, "pairs": Preference, "sample": ContrastSample}
CANDIDATES = "candidates.yaml"  # in the directory of `principles learn`
AnyPrinciple = CritiquePrinciple | PreferencePrinciple


@dataclass(frozen=True)
class PrincipleDraws:
    """How often each principle of a constitution was drawn.

    Attributes:
        stage: The stage that drew them.
        constitution: The name of the constitution.
        fingerprint: Its hash.
        counts: Principle id -> number of draws, most drawn first; 0 for principles that were never drawn.
        principles: Principle id -> principle; empty if the file is missing or has changed since.
    """

    stage: str
    constitution: str
    fingerprint: str
    counts: Mapping[str, int]
    principles: Mapping[str, AnyPrinciple]

    def recorded(self) -> dict[str, Any]:
        """The draws as manifests record them."""
        counts = {name: count for name, count in self.counts.items() if count}
        return {
            "stage": self.stage,
            "constitution": self.constitution,
            "fingerprint": self.fingerprint,
            "drawn": counts,
        }


def principles_drawn_for(row: Row) -> list[str]:
    """The principle ids drawn for a row: one for each round, or one for each comparison (both orders count as one)."""
    if isinstance(row, Preference):
        return list(dict.fromkeys(vote.principle_id for vote in row.votes))
    if isinstance(row, ContrastSample):
        return [row.principle_id]
    rounds = [past.principle_id for past in row.history] if isinstance(row, Critique | Revision) else []
    return [*rounds, row.principle_id] if isinstance(row, Critique) else rounds


def count_draws(rows: Iterable[Row], manifest: Mapping[str, Any]) -> PrincipleDraws | None:
    """How often each principle was drawn for rows.

    Args:
        rows: The rows of a file.
        manifest: The manifest of that file.

    Returns:
        The draws, or None if the file was made without a constitution.
    """
    return draws_from_counts(Counter(principle for row in rows for principle in principles_drawn_for(row)), manifest)


def draws_from_counts(counts: Counter[str], manifest: Mapping[str, Any]) -> PrincipleDraws | None:
    """As `count_draws`, for draws that are already counted."""
    used = manifest.get("provenance", {}).get("constitution")
    if not used:
        return None
    known = {p.id: p for p in principles_behind(manifest)}
    order = sorted(counts.keys() | known.keys(), key=lambda name: (-counts[name], name))
    stage = manifest["provenance"]["stage"]
    return PrincipleDraws(stage, used["name"], used["fingerprint"], {name: counts[name] for name in order}, known)


def recorded_principles(sources: Iterable[Path]) -> list[dict[str, Any]]:
    """The draws behind files of rows and models, for the manifest of a training stage.

    They come from the manifests of the files, so that a model trained on a model trained on revisions still names the
    principles.
    """
    entries: list[dict[str, Any]] = []
    for source in sources:
        manifest = read_manifest(sidecar(source, "manifest.json")) or {}
        used = list(manifest.get("run", {}).get("principles", []))
        if not used and "constitution" in manifest.get("provenance", {}):
            row_type = ROW_TYPES.get(manifest["provenance"]["stage"], Revision)
            draws = count_draws((row for _, row in read_rows(str(source), rows_of(row_type))), manifest)
            used = [draws.recorded()] if draws else []
        entries += [entry for entry in used if entry not in entries]
    return entries


def provenance_of(source: str, *parts: str) -> dict[str, Any]:
    """Those parts of the provenance of a file that its manifest has, for an output that is made from it."""
    recorded = (read_manifest(sidecar(Path(source), "manifest.json")) or {}).get("provenance", {})
    return {part: recorded[part] for part in parts if part in recorded}


def principles_behind(manifest: Mapping[str, Any]) -> Sequence[AnyPrinciple]:
    """The principles that could be drawn for a file; empty if the constitution is missing or has changed since."""
    provenance, argv = manifest["provenance"], list(manifest.get("run", {}).get("argv", []))
    model: Any = PreferenceConstitution if provenance["stage"] in ROW_TYPES else CritiqueConstitution
    settings = provenance.get("settings", {})
    try:
        loaded: Any = open_constitution(model, *_constitution_options(argv))
        if loaded.fingerprint() != provenance["constitution"]["fingerprint"]:
            return []
        chosen: Sequence[AnyPrinciple] = select(
            loaded.principles, settings.get("principles"), settings.get("max_principles")
        )
    except CaiError:
        return []
    return chosen


def _constitution_options(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """`--constitution` and `--few-shot` of a command line; `principles learn` labels under its own candidates."""
    if list(argv[1:3]) == ["principles", "learn"]:
        return f"{option(argv, '-o', '--output')}/{CANDIDATES}", None
    return option(argv, "--constitution"), option(argv, "--few-shot")


def option(command: Sequence[str], *names: str) -> str | None:
    """The value of an option on a command line, `--name value` or `--name=value`; the last one counts.

    >>> option(["cai", "revise", "--few-shot=none"], "--few-shot")
    'none'
    """
    last = None
    for word, value in zip(command, [*command[1:], ""], strict=False):
        if word in names:
            last = value
        elif word.partition("=")[0] in names:
            last = word.partition("=")[2]
    return last
