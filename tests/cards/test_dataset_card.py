"""The card of an exported dataset."""

import json
from pathlib import Path

from conftest import Cai
from report_run import HOSTILE, make_run

VERDICT = {True: "yes", False: "**no**", None: "unknown"}


def test_the_card_names_principles_data_and_statistics_and_no_folder(cai: Cai, tmp_path: Path, run: Path) -> None:
    from huggingface_hub import DatasetCard

    assert cai("export", str(run / "revisions.jsonl"), "-o", "ds").code == 0
    card = DatasetCard.load(tmp_path / "ds/README.md")
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    text = card.text
    assert "Constitution `cai-critique-revision`" in text
    ids = [t["principle_id"] for line in (run / "revisions.jsonl").read_text().splitlines() for t in json.loads(line)["history"]]  # fmt: skip
    for name in set(ids):
        assert f"| `{name}` | {ids.count(name)} |" in text
    assert "| rows | 8 |" in text
    assert "`cai critique-revise`" in text
    assert "sha256 of `revisions.jsonl`" in text
    assert str(run.parent) not in text


def test_the_card_of_labels_says_whether_they_can_be_trusted(cai: Cai, tmp_path: Path, run: Path) -> None:
    audit = json.loads(cai("eval", "agreement", str(run / "preferences.jsonl"), "--json").stdout)
    assert cai("export", str(run / "preferences.jsonl"), "-o", "ds").code == 0
    text = (tmp_path / "ds/README.md").read_text()
    assert f"## Label audit\n\nTrusted: {VERDICT[audit['trusted']]}. {audit['reason']}" in text
    assert all(f"- {note}" in text for note in audit["notes"])


def test_the_card_of_pairs_without_votes_has_no_audit(cai: Cai, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    assert cai("export", "pairs.jsonl", "-o", "ds").code == 0
    assert "audit" not in (tmp_path / "ds/README.md").read_text()


def test_a_hostile_row_cannot_break_out_of_the_card(cai: Cai, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=20, hostile=True)
    assert cai("export", str(run / "revisions.jsonl"), "-o", "ds").code == 0
    text = (tmp_path / "ds/README.md").read_text()
    assert r"\<script\>" in text
    assert not [t for t in HOSTILE[:4] if t in text]
    assert "\x1b" not in text
