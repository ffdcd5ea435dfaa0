"""Which replies are paired, and which pairs are read."""

import json
from pathlib import Path

import pytest
from conftest import Cai
from helpers import preference, rows_in, sample_row, write_rows
from label_cases import human, run


def test_all_pairs_of_the_replies_to_a_prompt_are_compared(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [sample_row(1, k) for k in range(4)], "--one-order")
    assert (counts["in"], counts["out"]) == (6, 6)
    assert [row["id"] for row in rows_in(tmp_path / "prefs.jsonl")] == [
        f"p1/{pair}" for pair in ("0-1", "0-2", "0-3", "1-2", "1-3", "2-3")
    ]


def test_a_single_reply_and_identical_replies_are_skipped_and_counted(cai: Cai, tmp_path: Path) -> None:
    same = [sample_row(2, k, "same") for k in range(2)]
    counts = run(cai, tmp_path, [sample_row(1), *same, *(sample_row(3, k) for k in range(2))], "--one-order")
    assert counts["skipped_reasons"] == {"only one reply to the prompt": 1, "identical replies": 1}
    assert (counts["in"], counts["out"], counts["skipped"]) == (3, 1, 2)


def test_a_pair_with_an_empty_reply_or_that_differs_in_white_space_is_skipped_and_counted(
    cai: Cai, tmp_path: Path
) -> None:
    rows = [preference(1), preference(2, rejected=" "), preference(3, chosen="well", rejected="well\n")]
    counts = run(cai, tmp_path, rows, "--one-order")
    assert counts["skipped_reasons"] == {"empty reply": 1, "identical replies": 1}
    assert (counts["in"], counts["out"]) == (3, 1)


@pytest.mark.parametrize(
    ("order", "code", "lines"),
    [
        (
            [(1, 0), (1, 1), (2, 0), (2, 1), (1, 2)],
            "rows-out-of-order",
            (5, 1),
        ),
        ([(1, 0), (1, 1), (1, 0)], "duplicate-id", (3, 1)),
    ],
)
def test_scattered_or_repeated_replies_are_an_error_with_both_lines(
    order: list[tuple[int, int]], code: str, lines: tuple[int, int], cai: Cai, tmp_path: Path
) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(*which) for which in order])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    refused = cai("label-prefs", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "prefs.jsonl")
    assert (refused.code, refused.error) == (1, code)
    assert f"samples.jsonl:{lines[0]}:" in refused.stderr
    assert f"line {lines[1]}" in refused.stderr


def test_human_pairs_are_labelled_and_record_whom_humans_preferred(cai: Cai, tmp_path: Path) -> None:
    run(cai, tmp_path, [human(i) for i in range(40)], "--one-order")  # the judge likes what stands first
    rows = rows_in(tmp_path / "prefs.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert row["human"] == ("chosen" if row["chosen"][0]["content"].startswith("good") else "rejected")
    assert 8 < sum(row["human"] == "chosen" for row in rows) < 32  # the better reply stands on either side


def test_pairs_without_a_source_have_the_name_of_their_file_without_its_folders(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "human.jsonl", [human(1)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    words = ("--model", "scripted:script.jsonl", "--one-order", "--quiet")
    (row,) = map(json.loads, cai("label-prefs", str(tmp_path / "human.jsonl"), *words).stdout.splitlines())
    assert row["source"] == "human.jsonl"
    piped = cai("label-prefs", "-", *words, stdin=(tmp_path / "human.jsonl").read_bytes())
    assert json.loads(piped.stdout)["source"] == "stdin"


def test_a_repeated_pair_is_skipped_and_not_called_a_prompt(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [human(1), human(1)], "--one-order")
    assert (counts["out"], counts["skipped_reasons"]) == (1, {"the same as an earlier line": 1})


def test_a_random_pairing_uses_no_reply_twice(cai: Cai, tmp_path: Path) -> None:
    counts = run(cai, tmp_path, [sample_row(1, k) for k in range(5)], "--one-order", "--pairs", "random")
    assert (counts["in"], counts["skipped_reasons"]) == (3, {"no partner in a random pairing": 1})
    rows = rows_in(tmp_path / "prefs.jsonl")
    told = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    assert len(told) == len(set(told)) == 4


def test_best_vs_rest_pairs_the_reply_of_the_highest_score_with_each_other(cai: Cai, tmp_path: Path) -> None:
    scores = {1: [0.5, 2.0, -1.0, 2.0], 2: [3.0, 1.0]}
    rows = [sample_row(number, k) | {"score": x} for number, line in scores.items() for k, x in enumerate(line)]
    run(cai, tmp_path, rows, "--pairs", "best-vs-rest", "--one-order")
    assert [row["id"] for row in rows_in(tmp_path / "prefs.jsonl")] == ["p1/0-1", "p1/1-2", "p1/1-3", "p2/0-1"]


def test_best_vs_rest_needs_a_score_for_every_reply(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [sample_row(1, 0) | {"score": 1.0}, sample_row(1, 1)])
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    done = cai("label-prefs", "pairs.jsonl", "--model", "scripted:script.jsonl", "--pairs", "best-vs-rest")
    assert (done.code, done.error) == (1, "invalid-row")
    assert "pairs.jsonl:2: " in done.stderr
    assert "cai score" in done.stderr
