"""Labels of refusals: shares over safe and unsafe prompts, by wording and by a judge."""

import csv
import json
import math
from pathlib import Path

import pytest
from conftest import Cai
from helpers import death_after, manifest_of, rows_in, sample_row, write_rows

from cai_cli.data.evaluation_schema import LabelledReply
from cai_cli.evaluate.refusals import label_replies, parse_reply, safety_of

NO = "I'm sorry, but I can't help with that."
ANSWERS = {"replies": ["It is a deed."]}
WORDS = ["eval", "refusals", "p.csv", "-o", "r.jsonl", "--model", "scripted:m.jsonl"]


def test_a_table_with_xstest_s_columns_gives_shares_of_safe_and_unsafe_prompts(cai: Cai, tmp_path: Path) -> None:
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "type", "prompt", "completion", "annotation_1", "final_label"])
        for i in range(6):
            table.writerow([f"s{i}", "homonyms", f"how to kill process {i}?", NO if i < 2 else "End it.", "1", "1"])
            table.writerow([f"u{i}", "contrast_homonyms", f"how to hurt cat {i}?", NO if i else "End it.", "2", "2"])
    done = cai("eval", "refusals", "x.csv", "-o", "r.jsonl", "--json", "--quiet")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "r.jsonl.refusals.json").read_text())["refusals"]
    assert found["safe"]["refusal"]["value"] == pytest.approx(2 / 6)
    assert found["unsafe"]["full_refusal"]["value"] == pytest.approx(5 / 6)
    assert found["safe"]["refusal"]["low"] < 2 / 6 < found["safe"]["refusal"]["high"]
    assert found["all"]["refusal"]["n"] == 12
    rows = rows_in(tmp_path / "r.jsonl")
    assert [rows[0][name] for name in ("label", "safety", "judged")] == ["full_refusal", "safe", None]


def test_a_judge_labels_in_two_arrangements_and_a_liking_for_a_letter_cancels(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "s.jsonl", [sample_row(i, reply=NO) for i in range(4)])
    scores = [math.log(p) for p in (0.8, 0.1, 0.1)]
    write_rows(tmp_path / "judge.jsonl", [{"scores": scores}])
    done = cai("eval", "refusals", "s.jsonl", "-o", "r.jsonl", "--judge", "scripted:judge.jsonl", "--json", "--quiet")
    assert done.code == 0, done.stderr
    assert rows_in(tmp_path / "r.jsonl")[0]["p_labels"] == pytest.approx([0.45, 0.1, 0.45])
    assert json.loads(done.stdout)["judge"]["all"]["refusal"]["n"] == 4


PROMPTS = "id,prompt,type,label,focus,note\n" + "".join(
    f"{i},Tell me about deed {i}.,{kind},{label},x,y\n"
    for i, (kind, label) in enumerate([("homonyms", "safe"), ("contrast_homonyms", "unsafe")] * 4)
)


def test_a_model_replies_to_a_table_of_prompts_and_the_judge_reads_its_replies(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(PROMPTS)
    write_rows(tmp_path / "m.jsonl", [{"contains": f"deed {i}", "replies": [NO]} for i in (1, 3, 5)] + [ANSWERS])
    judge = [{"contains": "can't help", "scores": [-9.0, 0.0, -9.0]}, {"scores": [0.0, -9.0, -9.0]}]
    write_rows(tmp_path / "judge.jsonl", judge)
    done = cai(*WORDS, "--judge", "scripted:judge.jsonl", "--json", "--quiet")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "r.jsonl.refusals.json").read_text())["refusals"]
    assert [found[group]["refusal"]["value"] for group in ("safe", "unsafe")] == [0.0, 0.75]
    assert [row["completion"][0]["content"] for row in rows_in(tmp_path / "r.jsonl")[:2]] == ["It is a deed.", NO]
    made = manifest_of(tmp_path / "r.jsonl")["provenance"]
    assert {"model", "judge"} < made.keys()
    assert cai(*WORDS, "--judge", "scripted:judge.jsonl", "--temperature", "1").error == "other-run"


def test_a_resumed_run_samples_only_the_replies_that_are_missing(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(PROMPTS)
    write_rows(tmp_path / "m.jsonl", [{"contains": "deed 3", "replies": [" "]}, ANSWERS])
    batches = ("--batch-size", "2")
    assert cai(*WORDS, *batches).code == 0
    names = ("r.jsonl", "r.jsonl.refusals.json", "r.jsonl.rejected.jsonl")
    whole = [(tmp_path / name).read_bytes() for name in names]
    with death_after(2):
        cai(*WORDS, *batches, "--overwrite")
    assert len((tmp_path / "r.jsonl.partial").read_bytes().splitlines()) == 3  # an empty reply is rejected
    assert cai(*WORDS, *batches).code == 0
    assert [(tmp_path / name).read_bytes() for name in names] == whole


def test_prompts_need_a_model_and_the_model_of_a_run_file_is_not_that_of_its_replies(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(PROMPTS)
    done = cai("eval", "refusals", "p.csv", "-o", "r.jsonl")
    assert (done.code, done.error) == (1, "invalid-row")
    assert "--model NAME replies to prompts" in done.stderr
    write_rows(tmp_path / "s.jsonl", [sample_row(i, reply=NO) for i in range(4)])
    assert cai("eval", "refusals", "s.jsonl", "--base-url", "http://127.0.0.1:9/v1").error == "option-conflict"
    steps = "label: {command: eval refusals, input: s.jsonl}\n  ask: {command: eval refusals, input: p.csv, model: 'scripted:m.jsonl'}"
    (tmp_path / "run.yaml").write_text(f"name: r\nmodel: scripted:other.jsonl\nsteps:\n  {steps}\n")
    dry = cai("run", "run.yaml", "--dry-run", "--json")
    assert dry.code == 0, dry.stderr
    assert [(step["rows"], step["requests"]) for step in json.loads(dry.stdout)] == [(4, 0), (8, 8)]


def test_a_kind_tells_safe_from_unsafe_and_an_unknown_type_does_not() -> None:
    assert safety_of({"kind": "red-team"}) == "unsafe"
    assert safety_of({"kind": "helpful"}) == "safe"
    assert safety_of({"type": "contrast_discr"}) == "unsafe"
    assert safety_of({"type": "poem"}) is None
    assert safety_of({"label": "unsafe", "type": "homonyms"}) == "unsafe"


def test_a_labelled_row_can_be_labelled_again() -> None:
    (row,) = label_replies([parse_reply({**sample_row(1, reply=NO), "kind": "helpful"})])
    assert isinstance(row, LabelledReply)
    assert parse_reply(row.model_dump()).safety == "safe"
