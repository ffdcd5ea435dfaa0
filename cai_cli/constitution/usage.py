"""Which principles stand behind rows, how often each was drawn, and what they say."""

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
from cai_cli.data.schema import Critique, Preference, Revision, Row
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar

AnyPrinciple = CritiquePrinciple | PreferencePrinciple


@dataclass(frozen=True)
class Drawn:
    """One constitution as it was used. `counts`: principle id -> draws, most drawn first, those in play but never drawn
    with 0. `principles`: id -> the principle; empty where the file is gone or was changed since."""

    stage: str
    constitution: str
    fingerprint: str
    counts: Mapping[str, int]
    principles: Mapping[str, AnyPrinciple]

    def recorded(self) -> dict[str, Any]:
        """As a manifest holds it."""
        counts = {name: count for name, count in self.counts.items() if count}
        return {
            "stage": self.stage,
            "constitution": self.constitution,
            "fingerprint": self.fingerprint,
            "drawn": counts,
        }


def draws(row: Row) -> list[str]:
    """The principle of every draw behind a row: one a round, or one a comparison (asked in both orders it is one)."""
    if isinstance(row, Preference):
        return list(dict.fromkeys(vote.principle_id for vote in row.votes))
    turns = [turn.principle_id for turn in row.history] if isinstance(row, Critique | Revision) else []
    return [*turns, row.principle_id] if isinstance(row, Critique) else turns


def drawn(rows: Iterable[Row], manifest: Mapping[str, Any]) -> Drawn | None:
    """How often each principle was drawn for the rows that `manifest` is of; None where no constitution was used."""
    return drawn_counts(Counter(principle for row in rows for principle in draws(row)), manifest)


def drawn_counts(counts: Counter[str], manifest: Mapping[str, Any]) -> Drawn | None:
    """As `drawn`, of draws that are counted already."""
    used = manifest.get("provenance", {}).get("constitution")
    if not used:
        return None
    known = {p.id: p for p in principles_behind(manifest)}
    order = sorted(counts.keys() | known.keys(), key=lambda name: (-counts[name], name))
    stage = manifest["provenance"]["stage"]
    return Drawn(stage, used["name"], used["fingerprint"], {name: counts[name] for name in order}, known)


def recorded_principles(sources: Iterable[Path]) -> list[dict[str, Any]]:
    """The principles that shaped files of rows and models, by the manifests beside them: what a training stage puts
    into its own manifest, so that a model trained on a model trained on revisions still names them."""
    found: list[dict[str, Any]] = []
    for source in sources:
        manifest = read_manifest(sidecar(source, "manifest.json")) or {}
        used = list(manifest.get("run", {}).get("principles", []))
        if not used and "constitution" in manifest.get("provenance", {}):
            row_type: type[Row] = Preference if manifest["provenance"]["stage"] == "label-prefs" else Revision
            behind = drawn((row for _, row in read_rows(str(source), rows_of(row_type))), manifest)
            used = [behind.recorded()] if behind else []
        found += [entry for entry in used if entry not in found]
    return found


def principles_behind(manifest: Mapping[str, Any]) -> Sequence[AnyPrinciple]:
    """The principles that could be drawn, if the constitution is still what it was; else none."""
    provenance, argv = manifest["provenance"], list(manifest.get("run", {}).get("argv", []))
    model: Any = PreferenceConstitution if provenance["stage"] == "label-prefs" else CritiqueConstitution
    settings = provenance.get("settings", {})
    try:
        loaded: Any = open_constitution(model, option(argv, "--constitution"), option(argv, "--few-shot"))
        if loaded.fingerprint() != provenance["constitution"]["fingerprint"]:
            return []
        chosen: Sequence[AnyPrinciple] = select(
            loaded.principles, settings.get("principles"), settings.get("max_principles")
        )
    except CaiError:
        return []
    return chosen


def option(command: Sequence[str], *names: str) -> str | None:
    """The value of an option on a command line (`--name value` or `--name=value`); the last one counts."""
    found = None
    for word, value in zip(command, [*command[1:], ""], strict=False):
        if word in names:
            found = value
        elif word.partition("=")[0] in names:
            found = word.partition("=")[2]
    return found
