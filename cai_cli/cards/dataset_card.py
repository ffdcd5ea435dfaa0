"""The README.md of an exported dataset."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cai_cli import __version__
from cai_cli.cards.markdown import cell, table
from cai_cli.constitution.usage import PrincipleDraws, draws_from_counts, principles_drawn_for
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import Critique, Preference, Prompt, Revision, Row, Sample

PAPER = "[Constitutional AI](https://arxiv.org/abs/2212.08073)"
USED_BY: Mapping[type[Row], str] = {
    Prompt: "TRL's RLOOTrainer and GRPOTrainer",
    Sample: "TRL's SFTTrainer",
    Revision: "TRL's SFTTrainer (`completion` is the last revision; `history` holds the earlier rounds)",
    Critique: "no trainer: it holds critiques, and no revised replies",
    Preference: "TRL's RewardTrainer and DPOTrainer (hard labels; `p_chosen` is the soft label; leave out ties, where "
    "it is 0.5)",
}


@dataclass
class DatasetStats:
    """Statistics of the rows of an exported dataset, collected while they are written."""

    rows: int = 0
    principles: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0
    human: int = 0
    p_chosen: float = 0.0
    rejected: Counter[str] = field(default_factory=Counter)
    ties: int = 0

    def add(self, row: Row) -> None:
        """Add one row."""
        self.rows += 1
        self.principles.update(principles_drawn_for(row))
        self.cut_off += isinstance(row, Sample) and row.finish_reason == CUT_OFF
        if isinstance(row, Preference):
            self.cut_off += (row.chosen_finish_reason, row.rejected_finish_reason).count(CUT_OFF)
            self.human += row.human is not None
            self.p_chosen += row.p_chosen
            self.ties += row.p_chosen == 0.5

    def by_name(self, row_type: type[Row]) -> dict[str, Any]:
        """Return the statistics that apply to this type of rows, by their names on the card."""
        statistics: dict[str, Any] = {"rows": self.rows}
        if issubclass(row_type, Sample | Preference):
            statistics["replies cut off at the length limit"] = self.cut_off
        if row_type is Preference:
            statistics |= {"mean p_chosen": self.p_chosen / self.rows, "ties": self.ties}
            statistics["with a human label"] = self.human
        statistics |= {f"left out: {reason}": count for reason, count in sorted(self.rejected.items())}
        return statistics


def dataset_card(
    name: str,
    row_type: type[Row],
    columns: list[str],
    stats: DatasetStats,
    manifest: Mapping[str, Any] | None,
    sha256: str | None,
    audit: Mapping[str, Any] | None = None,
) -> str:
    """Return the README.md of a dataset: its rows, the principles behind them, and how they were made.

    The card contains no local path.

    Args:
        name: Name of the file of rows.
        row_type: Type of the rows.
        columns: Columns of the dataset.
        stats: Statistics of the rows.
        manifest: Manifest of the file, or None.
        sha256: Hash of the file, or None.
        audit: Audit of the labels (`label_audit`); None where no row has votes.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    head = DatasetCardData(
        tags=["constitutional-ai", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    parts = [
        f"# {cell(name)}",
        f"{row_type.__name__} rows, exported by cai {__version__}; {PAPER}. Read by {USED_BY[row_type]}.",
        f"Columns: {', '.join(f'`{column}`' for column in columns)}.",
        table("Statistics", stats.by_name(row_type)),
        _label_audit(audit) if audit else "",
    ]
    if manifest:
        parts += [_principles(draws_from_counts(stats.principles, manifest)), _made_by(manifest)]
    else:
        parts.append("How these rows were made is unknown: the file has no manifest.")
    if sha256:
        parts.append(f"sha256 of `{cell(name)}`: `{sha256}`")
    text = "\n\n".join(part for part in parts if part)
    return str(DatasetCard(f"---\n{head.to_yaml()}\n---\n\n{text}\n"))


def _label_audit(audit: Mapping[str, Any]) -> str:
    """Whether the labels can be trusted, why, and the further findings, each with its 95% interval."""
    verdict = {True: "yes", False: "**no**", None: "unknown"}[audit["trusted"]]
    notes = "".join(f"- {cell(note)}\n" for note in audit["notes"])
    return f"## Label audit\n\nTrusted: {verdict}. {cell(audit['reason'])}\n\n{notes}".rstrip()


def _principles(used: PrincipleDraws | None) -> str:
    if used is None:
        return ""
    rows = "".join(
        f"| `{cell(name)}` | {count:,} | {cell(_text_of(used, name))} |\n" for name, count in used.counts.items()
    )
    return (
        f"## Principles\n\nConstitution `{cell(used.constitution)}` (`{used.fingerprint}`).\n\n"
        f"| principle | drawn | text |\n|---|---|---|\n{rows}"
    ).rstrip()


def _text_of(used: PrincipleDraws, name: str) -> str:
    principle = used.principles.get(name)
    texts = principle.model_dump(include={"critique", "revision", "comparison"}) if principle else {}
    return " / ".join(texts.values()) or "(text not available)"


def _made_by(manifest: Mapping[str, Any]) -> str:
    made = manifest["provenance"]
    model = {f"model, {key}": value for key, value in (made.get("model") or {}).items()}
    parts = [
        f"## How it was made\n\n`cai {made['stage']}` {made['cai']}",
        table("", {**model, **{f"input `{k}`, sha256": v for k, v in made["input"].items() if v}}),
        table("Settings", made["settings"]),
        table("Rows in and out", {k: v for k, v in manifest["counts"].items() if not k.endswith("_reasons")}),
        table("Versions", manifest.get("run", {}).get("versions", {})),
    ]
    return "\n\n".join(part for part in parts if part)
