"""`cai convert` writes rows of any format as ours, joins batch results to their prompts, and says what it left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, write_rows

from cai_cli.data.schema import Preference, Prompt, Sample, load_row
from cai_cli.runtime.convert import Target

U, G = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}


def convert(cai: Cai, rows: list[Any], *words: str, folder: Path) -> list[dict[str, Any]]:
    write_rows(folder / "in.jsonl", rows)
    done = cai("convert", "in.jsonl", "-o", "out.jsonl", "--overwrite", *words)
    assert done.code == 0, done.stderr
    return rows_in(folder / "out.jsonl")


def test_the_first_row_decides_what_is_written(cai: Cai, tmp_path: Path) -> None:
    for row, row_type in (
        ({"messages": [U, G]}, Sample),
        ({"messages": [U]}, Prompt),
        ({"chosen": [U, G], "rejected": [U, {**G, "content": "No."}]}, Preference),
    ):
        (written,) = convert(cai, [row], folder=tmp_path)
        load_row(row_type, written)


@pytest.mark.parametrize(("target", "row_type"), [(Target.PROMPTS, Prompt), (Target.COMPLETIONS, Sample)])
def test_pairs_are_written_as_prompts_or_as_the_chosen_completions(
    target: Target, row_type: Any, cai: Cai, tmp_path: Path
) -> None:
    pair = {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "No."}
    (row,) = convert(cai, [pair], "--to", target.value, "--kind", "helpful", folder=tmp_path)
    made = load_row(row_type, row)
    assert (made.prompt[0].content, made.kind, made.source) == ("Name a fruit.", "helpful", "in.jsonl")


def test_the_summary_and_the_manifest_say_what_was_read_left_out_and_rejected(cai: Cai, tmp_path: Path) -> None:
    tool = {"messages": [U, {"role": "tool", "content": "x"}, G]}
    write_rows(tmp_path / "in.jsonl", [{"messages": [U, G], "lang": "en"}, {"instruction": "q", "output": "a"}, tool])
    done = cai("convert", "in.jsonl", "-o", "out.jsonl")
    assert "read as: messages (1), Alpaca (1); left out: lang (1)" in done.stderr
    counts = manifest_of(tmp_path / "out.jsonl")["counts"]
    assert (counts["in"], counts["out"], counts["rejected"], counts["dropped"]) == (3, 2, 1, {"lang": 1})
    (rejected,) = rows_in(tmp_path / "out.jsonl.rejected.jsonl")
    assert rejected["reason"].startswith("a tool call")
    assert json.loads(rejected["row"]) == tool


def test_batch_results_are_joined_to_their_requests_whatever_the_order(cai: Cai, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "requests.jsonl",
        (
            {"custom_id": f"p{i}", "body": {"messages": [{"role": "user", "content": f"question {i}"}]}}
            for i in range(5)
        ),
    )

    def result(i: int, **more: Any) -> dict[str, Any]:
        choices = [{"index": k, "finish_reason": "stop", "message": {**G, "content": f"{i}/{k}"}} for k in range(2)]
        return {
            "custom_id": f"p{i}",
            "error": None,
            "response": {"status_code": 200, "body": {"choices": choices}},
        } | more

    rows = convert(cai, [result(3), result(1, error="x"), result(0)], "--prompts", "requests.jsonl", folder=tmp_path)
    assert [(row["id"], row["sample_index"], row["completion"][0]["content"]) for row in rows] == [
        ("p3", 0, "3/0"), ("p3", 1, "3/1"), ("p0", 0, "0/0"), ("p0", 1, "0/1"),
    ]  # fmt: skip
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 3"}]
    write_rows(tmp_path / "in.jsonl", [result(9)])
    assert cai("convert", "in.jsonl", "--prompts", "requests.jsonl", "-o", "new.jsonl").error == "invalid-row"
    assert cai("convert", "in.jsonl", "-o", "new.jsonl").error == "invalid-row"


def test_two_replies_to_one_prompt_have_ids_of_their_own_and_repeated_rows_are_skipped(
    cai: Cai, tmp_path: Path
) -> None:
    other = {"messages": [U, {**G, "content": "A plum."}]}
    rows = convert(cai, [{"messages": [U, G]}, other, {"messages": [U, G]}, other], folder=tmp_path)
    assert len({row["id"] for row in rows}) == len(rows) == 2
    assert manifest_of(tmp_path / "out.jsonl")["counts"]["skipped"] == 2
    write_rows(tmp_path / "in.jsonl", [{"id": "a", "messages": [U, G]}, {"id": "a", **other}])
    assert cai("convert", "in.jsonl", "-o", "new.jsonl").error == "duplicate-id"


def test_scores_give_soft_labels(cai: Cai, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0}
    (row,) = convert(cai, [pair], "--soft-from", "score", folder=tmp_path)
    assert row["p_chosen"] == pytest.approx(0.7311, abs=1e-4)
    assert cai("convert", "in.jsonl", "-o", "x", "--soft-from", "score", "--to", "prompts").error == "option-conflict"


def test_a_converted_file_goes_through_the_commands_that_read_it(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one."], "scores": [-0.1, -3.0]}])
    write_rows(
        tmp_path / "sg.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}]
    )
    assert cai("convert", "sg.jsonl", "-o", "samples.jsonl").code == 0
    words = ("--model", "scripted:script.jsonl", "-o")
    assert cai("critique-revise", "samples.jsonl", *words, "revisions.jsonl", "--rounds", "1").code == 0
    assert cai("sample", "sg.jsonl", *words, "again.jsonl").code == 0
    assert rows_in(tmp_path / "again.jsonl")[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert cai("export", "sg.jsonl", "-o", "dataset").code == 0
    tool = {"messages": [U, {"role": "tool", "content": "x"}, G]}
    write_rows(tmp_path / "tool.jsonl", [tool, {"messages": [U, G]}])
    assert "1 Sample rows, 1 left out (a tool call" in cai("export", "tool.jsonl", "-o", "used").stderr
    parted = {"chosen": [U, G, U, G], "rejected": [U, {**G, "content": "No."}, U, G]}
    for rows, code in (([tool], "no-rows"), ([parted], "all-rejected"), ([{"a": 1}], "invalid-row")):
        write_rows(tmp_path / "bad.jsonl", rows)
        assert cai("export", "bad.jsonl", "-o", "none").error == code
    assert cai("dedup", "sg.jsonl", "-o", "distinct.jsonl").code == 0
