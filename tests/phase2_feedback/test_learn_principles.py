"""A rule that decides the preferences is found among the proposals, and no other; a killed run ends the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import Json, assistant, death_after, rows_in, user, write_rows

from cai_cli.constitution.schema import PreferenceConstitution, load
from cai_cli.phase2_feedback.learn_principles import LearnConfig, run
from cai_cli.prompting.proposals import proposed_principle

START = "Choose the reply that"
RULES = ["is kind.", "is rude.", "is in Latin."]
OUTPUTS = ("proposals.jsonl", "candidates.yaml", "test_pairs.jsonl", "votes.jsonl", "ranking.json", "constitution.yaml")


def script(folder: Path) -> Path:
    """Proposes each rule equally often; by "is kind" the kind reply wins, by "is rude" the other, else the position."""
    lines: list[Json] = [{"contains": "Which rule explains", "replies": [f" {rule}\nMore." for rule in RULES]}]
    for rule, first in (("is kind.", "kind"), ("is rude.", "blunt")):
        for word in ("kind", "blunt"):
            scores = [-0.5, -2.5] if word == first else [-2.5, -0.5]
            lines.append({"contains": f"{rule} Options:\n (A) [[[{word}", "scores": scores})
    return write_rows(folder / "script.jsonl", [*lines, {"scores": [-0.2, -1.5]}])


def pairs(number: int, *, human: bool = True) -> list[Json]:
    rng = random.Random(0)
    rows = []
    for i in range(number):
        # One pair of ten breaks the rule.
        kind, blunt = assistant(f"kind words {i}"), assistant(f"blunt words {i}")
        chosen, rejected = (kind, blunt) if rng.random() < 0.9 else (blunt, kind)
        row = {"id": f"p{i}", "prompt": user(f"question {i}"), "chosen": chosen, "rejected": rejected}
        if not human:
            row |= {"p_chosen": 0.8, "votes": [], "human": None, "source": None}
        rows.append(row)
    return rows


def learn(folder: Path, name: str = "out", **options: Any) -> dict[str, Any]:
    values = {"input": str(folder / "pairs.jsonl"), "output": str(folder / name), "few_shot": "none", "quiet": True}
    return run(LearnConfig.build({"model": f"scripted:{folder / 'script.jsonl'}", **values, **options}))


@pytest.mark.parametrize("human", [True, False])
def test_the_planted_rule_is_found_and_no_other(tmp_path: Path, human: bool) -> None:
    script(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs(60, human=human))
    found = learn(tmp_path)
    assert found["ranking"]["reference"] == ("human" if human else "panel")
    findings = {principle["id"][3:]: principle["finding"] for principle in found["ranking"]["principles"]}
    assert findings == {"is-kind": "agrees", "is-rude": "disagrees", "is-in-latin": "not shown"}
    learned = load(tmp_path / "out/constitution.yaml")
    assert isinstance(learned, PreferenceConstitution)
    assert [principle.comparison for principle in learned.principles] == [f"{START} is kind."]
    proposed = {row["id"] for row in rows_in(tmp_path / "out/proposals.jsonl")}
    tested = {row["id"] for row in rows_in(tmp_path / "out/votes.jsonl")}
    assert (len(proposed), len(tested), proposed & tested) == (30, 30, set())
    again = learn(tmp_path)
    assert again == found


def test_the_votes_can_be_ranked_exported_and_used(cai: Cai, tmp_path: Path) -> None:
    script(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs(60))
    words = ("pairs.jsonl", "-o", "out", "--model", "scripted:script.jsonl", "--few-shot", "none")
    done = cai("principles", "learn", *words)
    assert done.code == 0, done.stderr
    assert "1 of 3 candidates kept" in done.stderr
    ranked = cai("principles", "rank", "out/votes.jsonl", "--json")
    assert json.loads(ranked.stdout) == json.loads((tmp_path / "out/ranking.json").read_text())
    assert cai("principles", "list", "out/constitution.yaml").stdout.split()[0] == "preference"
    exported = cai("export", "out/votes.jsonl", "-o", "ff", "--for", "feedback-forensics")
    assert exported.code == 0, exported.stderr
    annotators = json.loads((tmp_path / "ff/data/annotated_pairs.json").read_text())["annotators"].values()
    described = {a["description"] for a in annotators if a["type"] == "principle"}
    assert described == {f"Select the response that {rule}" for rule in RULES}
    model = ("--model", "scripted:script.jsonl", "--constitution", "out/constitution.yaml")
    assert cai("label-prefs", "out/test_pairs.jsonl", "-o", "labels.jsonl", *model).code == 0


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_killed_run_ends_with_the_same_files(tmp_path: Path, calls: int) -> None:
    script(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs(30))
    learn(tmp_path, "whole", batch_size=8)
    with death_after(calls):
        learn(tmp_path, batch_size=8)
    learn(tmp_path, batch_size=8)
    for name in OUTPUTS:
        whole = tmp_path / "whole" / name
        assert (tmp_path / "out" / name).exists() == whole.exists(), name
        if whole.exists():
            assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes(), name


def test_where_no_candidate_agrees_there_is_no_constitution(cai: Cai, tmp_path: Path) -> None:
    script(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pairs(8))
    done = cai(
        "principles", "learn", "pairs.jsonl", "-o", "out", "--model", "scripted:script.jsonl", "--few-shot", "none"
    )
    assert done.code == 0
    assert "no candidate is shown to agree" in done.stderr
    assert not (tmp_path / "out/constitution.yaml").exists()


def test_pairs_without_a_preference_and_pairs_of_one_prompt_are_refused(cai: Cai, tmp_path: Path) -> None:
    script(tmp_path)
    ties = [{**row, "p_chosen": 0.5} for row in pairs(4, human=False)]
    for rows in (ties, [{**row, "prompt": user("one question")} for row in pairs(4)]):
        write_rows(tmp_path / "pairs.jsonl", rows)
        done = cai("principles", "learn", "pairs.jsonl", "-o", "out", "--model", "scripted:script.jsonl")
        assert (done.code, done.error) == (1, "no-rows")


@pytest.mark.parametrize(
    ("answer", "principle"),
    [
        (" is kind.\nMore text.", f"{START} is kind."),
        ('"Choose the reply that is kind and short"', f"{START} is kind and short."),
        (" ", None),
        (" rude.", None),
    ],
)
def test_one_sentence_of_an_answer_is_the_principle(answer: str, principle: str | None) -> None:
    assert proposed_principle(answer) == principle
