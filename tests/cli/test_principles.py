"""`cai principles` lists, shows and validates."""

import json
from pathlib import Path

from conftest import Cai
from helpers import write_rows
from label_rows import pref


def test_the_principles_command_lists_shows_and_validates(cai: Cai, small: Path) -> None:
    assert cai("principles", "list", "small.yaml").stdout.split() == [
        "critique-revision",
        "a",
        "harm",
        "critique-revision",
        "b",
    ]
    shown = cai("principles", "show", "a", "--constitution", "small.yaml")
    assert shown.stdout == "a  [harm]\n  critique: Look: {here}.\n  revision: Rewrite it.\n"
    missing = cai("principles", "show", "a", "z", "--constitution", "small.yaml")
    assert (missing.code, missing.error) == (1, "unknown-principle")
    valid = cai("principles", "validate", "small.yaml", "compare.yaml")
    assert valid.stdout.splitlines() == [
        "small.yaml: ok, critique-revision, 2 principles, 1 examples",
        "compare.yaml: ok, preference, 1 principles, 1 examples",
    ]


def test_rank_prints_a_table_and_writes_it_once(cai: Cai, tmp_path: Path) -> None:
    rows = [
        pref(i, ("kind", "ab", 0.9), ("kind", "ba", 0.2), ("brief", "ab", 0.6), ("brief", "ba", 0.7), human="chosen")
        for i in range(12)
    ]
    write_rows(tmp_path / "labels.jsonl", (row.model_dump() for row in rows))
    done = cai("principles", "rank", "labels.jsonl", "--json", "-o", "ranking.json")
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "ranking.json").read_text())
    assert [(p["id"], p["finding"]) for p in found["principles"]] == [("kind", "agrees"), ("brief", "disagrees")]
    again = cai("principles", "rank", "labels.jsonl", "-o", "ranking.json")
    assert (again.code, again.error) == (1, "output-exists")
    piped = cai("principles", "rank", "-", stdin=(tmp_path / "labels.jsonl").read_bytes())
    assert piped.stdout.splitlines()[0] == "12 pairs of 12 prompts, 2 principles"
    unlabelled = [row.model_copy(update={"votes": []}).model_dump() for row in rows]
    write_rows(tmp_path / "labels.jsonl", unlabelled)
    none = cai("principles", "rank", "labels.jsonl")
    assert (none.code, none.error) == (1, "no-rows")
