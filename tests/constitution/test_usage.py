"""Which principles were drawn for rows and models, and that cards name them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of
from report_run import make_run
from tiny import tiny_model_dir

from cai_cli.constitution.schema import CritiqueConstitution, open_constitution
from cai_cli.constitution.usage import draws_from_counts, option, recorded_principles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "made", rows=6)


def drawn_in(path: Path) -> Counter[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    turns = [t["principle_id"] for row in rows for t in row.get("history", [])]
    votes = [row["votes"][0]["principle_id"] for row in rows if row.get("votes")]
    return Counter(turns + votes)


def test_rows_and_the_models_made_of_them_name_their_principles(run: Path) -> None:
    found = recorded_principles([run / "revisions.jsonl", run / "preferences.jsonl", run / "samples.jsonl"])
    assert [(f["stage"], f["constitution"]) for f in found] == [
        ("critique-revise", "cai-critique-revision"), ("label-prefs", "cai-preference"),
    ]  # fmt: skip
    assert found[0]["drawn"] == drawn_in(run / "revisions.jsonl")
    assert found[1]["drawn"] == drawn_in(run / "preferences.jsonl")
    manifest = json.loads((run / "sl-cai.manifest.json").read_text())
    manifest["run"]["principles"] = found[:1]
    (run / "sl-cai.manifest.json").write_text(json.dumps(manifest))
    assert recorded_principles([run / "sl-cai", run / "preferences.jsonl", run / "revisions.jsonl"]) == found


def test_rows_without_a_constitution_name_none(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text("{}\n")
    assert recorded_principles([Path("-"), tmp_path / "bare.jsonl", run / "samples.jsonl", tmp_path]) == []


def test_a_narrowed_draw_lists_only_the_principles_in_play() -> None:
    loaded = open_constitution(CritiqueConstitution, None, None)
    used = {"name": loaded.name, "fingerprint": loaded.fingerprint()}
    manifest = {"provenance": {"stage": "revise", "constitution": used, "settings": {"max_principles": 2}}}
    found = draws_from_counts(Counter({"gone": 3}), manifest)
    assert found
    assert found.counts == {"gone": 3, **dict.fromkeys(sorted(p.id for p in loaded.principles[:2]), 0)}
    assert "gone" not in found.principles


def test_an_option_is_read_in_both_spellings_and_the_last_counts() -> None:
    assert option(["cai", "--a", "1", "--a=2"], "--a") == "2"
    assert option(["cai", "-a", "1"], "--a", "-a") == "1"
    assert option(["cai", "x"], "--a") is None


def test_a_model_s_card_names_the_principles_of_its_rows_and_of_the_model_before(
    cai: Cai, run: Path, tmp_path: Path
) -> None:
    tiny_model_dir(tmp_path / "tiny", max_position_embeddings=1024)
    done = cai("sft", "made/revisions.jsonl", "-o", "sl", "--model", "tiny", "--max-steps", "1", "--device", "cpu")
    assert done.code == 0, done.stderr
    card = (tmp_path / "sl/README.md").read_text()
    assert "## Principles: cai-critique-revision, drawn in critique-revise" in card
    for name, count in drawn_in(run / "revisions.jsonl").items():
        assert f"| `{name}` | {count} times |" in card
    done = cai("train-pm", "made/preferences.jsonl", "-o", "pm", "--model", "sl", "--max-steps", "1", "--device", "cpu")
    assert done.code == 0, done.stderr
    card = (tmp_path / "pm/README.md").read_text()
    assert "## Principles: cai-critique-revision, drawn in critique-revise" in card
    assert "## Principles: cai-preference, drawn in label-prefs" in card
    assert len(manifest_of(tmp_path / "pm")["run"]["principles"]) == 2
