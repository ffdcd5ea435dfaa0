"""Writes labels as annotated pairs (`cai export FILE -o DIR --for feedback-forensics`).

Annotated pairs are the JSON format, version 2.0, in which inverse-cai (Findeis et al., arXiv 2406.06560) writes its
results and which Feedback Forensics shows: pairs of replies, annotators, and what each annotator prefers. Every
principle is an annotator of its own. The default annotator, with which the others are compared, holds the human labels,
or the labels themselves where no row has a human label. Checked with the loaders of inverse-cai 0.4.8 and
feedback-forensics 0.5.0.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from hashlib import md5
from pathlib import Path
from typing import Any

import orjson

from cai_cli.cards.dataset_card import DatasetStats
from cai_cli.cards.export import REJECTED, row_parser, usable_rows
from cai_cli.common.errors import CaiError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import PreferencePrinciple
from cai_cli.constitution.usage import principles_behind
from cai_cli.data.jsonl import AppendFile, display_name, read_rows
from cai_cli.data.schema import Preference
from cai_cli.data.transcripts import render_transcript
from cai_cli.metrics.label_audit import mean_for_chosen, votes_by_principle
from cai_cli.runtime.manifest import hash_input, read_manifest
from cai_cli.runtime.output_files import sidecar

FILE = "annotated_pairs.json"
VERSION = "2.0"
Annotation = dict[str, str | None]


def annotator_id(text: str) -> str:
    """The id that inverse-cai gives to the annotator with this description."""
    return md5(text.encode(), usedforsecurity=False).hexdigest()[:8]


# Feedback Forensics finds the default annotator by the hash of this sentence.
DEFAULT = annotator_id("Default annotator from original dataset (from column `preferred_text`)")
LABEL = annotator_id("cai label")


class AnnotatedPairs:
    """Makes comparisons of rows and collects their annotators.

    Args:
        human: Whether the default annotator holds the human labels, and not the labels of `cai`.
        principles: The principles by id, as far as they are known.
    """

    def __init__(self, human: bool, principles: Mapping[str, PreferencePrinciple]) -> None:
        self.human, self.principles = human, principles
        what = "human labels" if human else "labels of cai: the mean of the principles' votes"
        self.annotators = {DEFAULT: {"name": "human" if human else "label", "description": what, "type": "unknown"}}
        if human:
            self.annotators[DEFAULT]["type"] = "human"

    def comparison(self, row: Preference) -> dict[str, Any]:
        """One entry of `comparisons`; a hash of the row's id decides which reply is `response_a`."""
        chosen_first = bool(seed_for(0, "sides", row.id) & 1)
        a, b = (row.chosen, row.rejected) if chosen_first else (row.rejected, row.chosen)

        def preferred(p_chosen: float | None) -> Annotation:
            if p_chosen is None or p_chosen == 0.5:
                return {"pref": None, "no_pref_reason": "not_applicable"}
            return {"pref": "a" if (p_chosen > 0.5) == chosen_first else "b"}

        human = None if row.human is None else float(row.human == "chosen")
        annotations = {DEFAULT: preferred(human if self.human else row.p_chosen)}
        if self.human and row.votes:
            text = "labels of cai: the mean of the principles' votes"
            self.annotators.setdefault(LABEL, {"name": "label", "description": text, "type": "unknown"})
            annotations[LABEL] = preferred(row.p_chosen)
        for name, votes in votes_by_principle(row.votes).items():
            annotations[self._principle(name)] = preferred(mean_for_chosen(votes))
        one_turn = len(row.prompt) == 1
        return {
            "id": row.id,
            "prompt": row.prompt[0].content if one_turn else render_transcript(row.prompt).strip(),
            "response_a": {"text": a[0].content},
            "response_b": {"text": b[0].content},
            "annotations": annotations,
            "metadata": {"source": row.source or "", "p_chosen": str(row.p_chosen)},
        }

    def _principle(self, name: str) -> str:
        """The annotator of a principle, described as inverse-cai words its principles."""
        known = self.principles.get(name)
        text = re.sub(r"^Choose the (reply|response) ", "Select the response ", known.comparison) if known else name
        self.annotators.setdefault(key := annotator_id(text), {"name": name, "description": text, "type": "principle"})
        return key


def export_annotated_pairs(source: str, work: Path) -> dict[str, Any]:
    """Write the annotated pairs of `source` into the new directory `work`, and a README.

    Returns:
        The summary, as `export`.

    Raises:
        CaiError: As `export`, and `wrong-row-type` for rows that are no preferences.
    """
    file = hash_input(source)
    row_type, parse = row_parser(source)
    (work / "data").mkdir(parents=True)
    if row_type is not Preference:
        hint = "`cai label-prefs` writes Preference rows"
        raise CaiError(f"{source} holds {row_type.__name__} rows, not preferences", hint, code="wrong-row-type")
    manifest = read_manifest(sidecar(Path(source), "manifest.json"))
    known = {p.id: p for p in principles_behind(manifest) if isinstance(p, PreferencePrinciple)} if manifest else {}
    human = any(getattr(row, "human", None) for _, row in read_rows(source, parse, lambda *_: None))
    pairs, stats, rejected = AnnotatedPairs(human, known), DatasetStats(), AppendFile(work / REJECTED)
    name = Path(display_name(source)).name
    with closing(rejected), (work / "data" / FILE).open("wb") as out:
        usable: Iterator[Any] = usable_rows(source, parse, stats, rejected)
        for number, row in enumerate(usable):
            out.write(b",\n" if number else b'{"comparisons":[\n')
            out.write(orjson.dumps(pairs.comparison(row)))
        metadata = {
            "version": VERSION,
            "description": f"Written by cai export from {name}",
            "dataset_name": name,
            "default_annotator": DEFAULT,
            "available_metadata_keys_per_comparison": ["source", "p_chosen"],
        }
        rest = orjson.dumps({"annotators": pairs.annotators, "metadata": metadata})
        out.write(b"\n],\n" + rest.removeprefix(b"{") + b"\n")
    (work / "README.md").write_text(_README.format(file=name, sha256=file.sha256, rows=stats.rows), encoding="utf-8")
    counts = {"rejected": stats.rejected.total(), "rejected_reasons": dict(sorted(stats.rejected.items()))}
    return {"rows": stats.rows, "type": "Preference", "columns": list(pairs.annotators), **counts}


_README = """\
# {file}

{rows:,} pairs from `{file}` (SHA-256 {sha256}), written by `cai export` as annotated pairs:

```sh
feedback-forensics -d DIR/data/annotated_pairs.json
```
"""
