"""The feedback that ships with the demo: valid rows of known principles, apart from the prompts that evaluate."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cai_cli.common.near_duplicates import NearDuplicates
from cai_cli.constitution.schema import CritiqueConstitution, PreferenceConstitution, open_constitution
from cai_cli.data.schema import Preference, Prompt, Revision, Row, Sample, load_row
from cai_cli.metrics.reply_habits import evasive_opening
from cai_cli.models.fetch import adapter_base
from cai_cli.models.reading import recorded_base

EXAMPLES = Path(__file__).parents[2] / "examples"
FEEDBACK = EXAMPLES / "feedback"


def rows(name: str, row_type: type[Row]) -> list[Any]:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    return [load_row(row_type, json.loads(line)) for line in lines]


def last_turn(row: Prompt | Preference) -> str:
    return row.prompt[-1].content


REVISIONS, HELPFUL = rows("feedback/revisions.jsonl", Revision), rows("feedback/helpful.jsonl", Sample)
PAIRS, HELD_OUT = rows("feedback/preferences.jsonl", Preference), rows("feedback/held_out.jsonl", Prompt)
SHIPPED = {row.id: row for name in ("red_team.jsonl", "helpful.jsonl") for row in rows(name, Prompt)}


def test_the_manifest_states_the_origin_of_every_file_and_its_hash() -> None:
    manifest = json.loads((FEEDBACK / "manifest.json").read_bytes())
    assert "larger language model" in manifest["written_by"]
    assert manifest["human_labels"] is False
    assert manifest["files"].keys() == {file.name for file in FEEDBACK.glob("*.jsonl")}
    for name, recorded in manifest["files"].items():
        content = (FEEDBACK / name).read_bytes()
        assert recorded["sha256"] == hashlib.sha256(content).hexdigest(), name
        assert recorded["rows"] == content.count(b"\n")


@pytest.mark.parametrize("read", [REVISIONS, HELPFUL, PAIRS, HELD_OUT])
def test_ids_are_unique_and_prompts_of_the_shipped_files_are_unchanged(read: list[Any]) -> None:
    assert len({row.key for row in read}) == len(read)
    for row in read:
        assert row.id not in SHIPPED or row.prompt == SHIPPED[row.id].prompt


def test_every_principle_of_the_feedback_is_a_shipped_one() -> None:
    critique = {p.id for p in open_constitution(CritiqueConstitution, None, None).principles}
    assert {step.principle_id for row in REVISIONS for step in row.history} == critique
    preference = {p.id for p in open_constitution(PreferenceConstitution, None, None).principles}
    assert {vote.principle_id for row in PAIRS for vote in row.votes} == preference


def test_a_pair_s_label_is_the_mean_of_its_votes() -> None:
    for row in PAIRS:
        votes = [vote.p_first if vote.order == "ab" else 1 - vote.p_first for vote in row.votes]
        assert row.p_chosen == pytest.approx(sum(votes) / len(votes), abs=1e-3), row.id
        assert {vote.order for vote in row.votes} == {"ab", "ba"}
        assert row.chosen != row.rejected


def test_no_prompt_that_evaluates_is_near_one_that_trains() -> None:
    evaluation = [*HELD_OUT, *rows("evaluation.jsonl", Prompt)]
    assert min(sum(row.kind == kind for row in HELD_OUT) for kind in ("red-team", "helpful")) >= 48
    index = NearDuplicates(0.5)
    training = {last_turn(row): row.id for row in [*REVISIONS, *HELPFUL, *PAIRS]}
    for text, name in training.items():
        assert index.find(text) is None, f"{name} is near another training prompt"
        index.add(text, text)
    for row in evaluation:
        assert index.find(last_turn(row)) is None, row.id
        index.add(f"held out {row.id}", last_turn(row))


def test_replies_are_short_and_whole_and_only_red_team_prompts_are_declined() -> None:
    for row in [*REVISIONS, *HELPFUL]:
        assert len(row.reply.split()) <= 45
        assert row.finish_reason == "stop"
    assert all(row.kind == "red-team" and row.history[0].critique and row.reply for row in REVISIONS)
    declined = [row.reply.removeprefix("I'm sorry, but ") for row in REVISIONS]
    assert len({" ".join(reply.split()[:6]) for reply in declined}) > 0.8 * len(REVISIONS)
    assert not [row.id for row in HELPFUL if evasive_opening(row.reply)]


def test_the_shipped_head_is_576_numbers_bound_to_the_demo_s_model() -> None:
    probe = FEEDBACK / "harmless_probe"
    weights = load_file(probe / "adapter_model.safetensors")
    assert [tuple(weight.shape) for weight in weights.values()] == [(1, 576)]
    assert adapter_base(probe) == "smollm2-135m"
    assert len(recorded_base(probe) or "") == 64
    assert "MIT License" in (probe / "LICENSE").read_text(encoding="utf-8")
