"""Labels from votes: orders are averaged, votes refer to the chosen reply, and position bias gives no preference."""

import json
from pathlib import Path

import pytest
from conftest import Cai
from helpers import rows_in, sample_row, write_rows
from label_cases import human, run
from tiny import tiny_model_dir

from cai_cli.models.aliases import ALIASES

# --- the command ------------------------------------------------------------------------------------------------------


def test_by_default_a_constant_judge_gives_ties_which_are_kept_with_the_first_sample_as_chosen(
    cai: Cai, tmp_path: Path
) -> None:
    counts = run(cai, tmp_path, [sample_row(i, k) for i in range(3) for k in range(2)])
    assert (counts["out"], counts["rejected_reasons"]) == (3, {})
    rows = rows_in(tmp_path / "prefs.jsonl")
    assert [row["p_chosen"] for row in rows] == [0.5] * 3
    assert [row["chosen"] for row in rows] == [sample_row(i, 0)["completion"] for i in range(3)]
    audited = json.loads(cai("eval", "agreement", "prefs.jsonl", "--json").stdout)
    assert (audited["trusted"], audited["reason"]) == (False, "no pair got a preference: 3 ties")


def test_whoever_labels_with_the_embedded_model_is_told_what_it_labels_better(
    cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    model = tiny_model_dir(tmp_path / "cache/models/smollm2-135m")
    (model / "source.json").write_text("{}")
    write_rows(tmp_path / "samples.jsonl", [sample_row(0, k) for k in range(2)])
    words = ("label-prefs", "samples.jsonl", "--few-shot", "none", "--json")
    embedded, other = cai(*words, "-o", "one.jsonl"), cai(*words, "-o", "two.jsonl", "--model", str(model))
    assert (embedded.code, other.code) == (0, 0)
    run_file = str(ALIASES["smollm2-135m"].run_file_for_labels)
    assert (Path(__file__).parents[2] / run_file).is_file()
    advice = f"cai run {run_file} (docs/contrast.md)"
    assert advice in embedded.stderr
    assert advice not in other.stderr


# --- methods, ensembles, and where pairs come from --------------------------------------------------------------------


def test_a_file_without_two_replies_to_a_prompt_is_an_error(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    write_rows(tmp_path / "single.jsonl", (sample_row(i) for i in range(3)))
    done = cai("label-prefs", "single.jsonl", "-o", "out.jsonl", "--model", "scripted:script.jsonl", "--json")
    assert (done.code, done.error) == (1, "no-rows")
    summary = json.loads(done.stdout)
    assert (summary["skipped"], summary["error"]["code"]) == (3, "no-rows")


def test_pairs_below_the_minimum_confidence_are_counted_and_can_be_judged_again(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [human(i) for i in range(3)], "--min-confidence", "0.6")
    assert counts["rejected_reasons"] == {"tie": 3}
    again = [json.loads(row["row"]) for row in rows_in(tmp_path / "prefs.jsonl.rejected.jsonl")]
    counts = run(cai, tmp_path, again, "--one-order", "--min-confidence", "0.95", "--overwrite")
    assert counts["rejected_reasons"] == {"under --min-confidence": 3}
    counts = run(cai, tmp_path, again, "--one-order", "--min-confidence", "0.9", "--overwrite")
    assert (counts["out"], counts["rejected"]) == (3, 0)
    relabelled = rows_in(tmp_path / "prefs.jsonl")
    run(cai, tmp_path, relabelled, "--one-order", "--overwrite")
    assert {row["id"] for row in rows_in(tmp_path / "prefs.jsonl")} == {row["id"] for row in relabelled}


def test_rejected_pairs_keep_their_votes_and_can_be_judged_again(cai: Cai, tmp_path: Path) -> None:
    run(cai, tmp_path, [sample_row(1, k) for k in range(2)], "--min-confidence", "0.51")
    (tie,) = rows_in(tmp_path / "prefs.jsonl.rejected.jsonl")
    row = json.loads(tie["row"])
    assert (row["p_chosen"], [v["order"] for v in row["votes"]]) == (0.5, ["ab", "ba"])
    again = cai(
        "label-prefs", "-", "--model", "scripted:script.jsonl", "--one-order", stdin=(tie["row"] + "\n").encode()
    )
    assert (again.code, json.loads(again.stdout)["id"]) == (0, tie["key"])


def test_every_labelling_ends_with_the_audit_of_its_labels(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(i, k) for i in range(8) for k in range(2)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    words = ("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "--one-order", "--json")
    filed = cai(*words, "-o", "prefs.jsonl")
    assert "warning: do not trust these labels: the judge saw one order only, and picks the first reply in 100.0%" in (
        filed.stderr
    )
    found = json.loads(filed.stdout)
    assert (found["out"], found["audit"]["trusted"], found["audit"]["first_picks"]["value"]) == (8, False, 1)
    piped = cai(*words)
    assert json.loads(piped.stderr.splitlines()[0])["audit"] == found["audit"]
    assert (
        cai("eval", "agreement", "prefs.jsonl", "--json").stdout
        == json.dumps(found["audit"], separators=(",", ":")) + "\n"
    )


def test_a_preference_says_which_of_its_replies_were_cut_off_and_they_are_counted(cai: Cai, tmp_path: Path) -> None:
    rows = [sample_row(i, k) | {"finish_reason": "length" if k else "stop"} for i in range(4) for k in range(2)]
    write_rows(tmp_path / "samples.jsonl", rows)
    write_rows(tmp_path / "script.jsonl", [{"scores": [-3.0, -0.1]}])  # the second reply
    words = ("label-prefs", "--model", "scripted:script.jsonl", "--one-order", "--json")
    done = json.loads(cai(*words, "samples.jsonl", "-o", "prefs.jsonl").stdout)
    assert done["reply_ends"] == {"replies": {"whole": 4, "cut_off": 4, "unknown": 0}}
    for row in rows_in(tmp_path / "prefs.jsonl"):
        assert (row["chosen_finish_reason"], row["rejected_finish_reason"]) == ("length", "stop")
    again = json.loads(cai(*words, "prefs.jsonl", "-o", "again.jsonl").stdout)  # with the sides drawn again
    assert again["reply_ends"] == done["reply_ends"]
    for old, new in zip(rows_in(tmp_path / "prefs.jsonl"), rows_in(tmp_path / "again.jsonl"), strict=True):
        ends = {old[side][0]["content"]: old[f"{side}_finish_reason"] for side in ("chosen", "rejected")}
        assert ends == {new[side][0]["content"]: new[f"{side}_finish_reason"] for side in ("chosen", "rejected")}


def test_votes_that_cannot_be_read_are_counted_where_the_pair_has_others(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [human(i) for i in range(4)])
    verdicts = {"contains": "shorter", "replies": ["Neither."]}, {"replies": ["The answer is: (A)"]}
    write_rows(tmp_path / "script.jsonl", verdicts)
    principles = [{"id": word, "comparison": f"Which is {word}?"} for word in ("shorter", "kinder")]
    (tmp_path / "two.yaml").write_text(json.dumps({"kind": "preference", "name": "two", "principles": principles}))
    labelled = cai(
        *("label-prefs", "pairs.jsonl", "-o", "prefs.jsonl", "--model", "scripted:script.jsonl", "--method", "verdict"),
        *("--constitution", "two.yaml", "--principles-per-pair", "all", "--one-order", "--json"),
    )
    counts = json.loads(labelled.stdout)
    assert (counts["out"], counts["missing_votes"]) == (4, 4)
    assert "4 of 8 votes are missing" in labelled.stderr
