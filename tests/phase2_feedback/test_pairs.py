"""`cai pairs`: labels that come from how replies were asked for."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, write_rows
from tiny import tiny_model_dir

from cai_cli.common.errors import InvalidRow
from cai_cli.data.schema import ContrastSample, Preference, load_row
from cai_cli.metrics.label_audit import audit
from cai_cli.phase2_feedback.pairs import PairsConfig, pair_items, reply_problem


def reply(text: str, contrast: str | None = None, **fields: Any) -> dict[str, Any]:
    asked = {"contrast": contrast, "principle_id": "kind"} if contrast else {}
    system = [{"role": "system", "content": f"You are {contrast}."}] if contrast else []
    row = {
        "id": "p",
        "prompt": [*system, {"role": "user", "content": "q"}],
        "kind": None,
        "source": None,
        "sample_index": 0,
        "completion": [{"role": "assistant", "content": text}],
        "finish_reason": "stop",
        "thoughts": None,
    }
    return row | asked | fields


def paired(cai: Cai, folder: Path, first: list[Any], second: list[Any], *words: str) -> Any:
    write_rows(folder / "first.jsonl", first)
    write_rows(folder / "second.jsonl", second)
    return cai("pairs", "first.jsonl", "second.jsonl", "-o", "prefs.jsonl", *words)


def test_the_character_that_follows_wins_and_the_prompt_has_no_character(cai: Cai, tmp_path: Path) -> None:
    ran = paired(cai, tmp_path, [reply("Gladly.", "following")], [reply("Go away.", "breaking")], "--p-chosen", "0.8")
    assert ran.code == 0
    (row,) = rows_in(tmp_path / "prefs.jsonl")
    assert [m["content"] for m in (*row["prompt"], *row["chosen"], *row["rejected"])] == ["q", "Gladly.", "Go away."]
    assert (row["p_chosen"], row["votes"][0]["principle_id"], row["votes"][0]["method"]) == (0.8, "kind", "unjudged")
    found = audit([load_row(Preference, row)])
    assert (found["trusted"], found["unjudged"], found["first_picks"], found["between_orders"]) == (None, 1, None, None)
    assert "no judge compared" in found["reason"]


def test_the_system_prompt_that_a_row_had_before_its_character_stays(cai: Cai, tmp_path: Path) -> None:
    tiny_model_dir(tmp_path / "m")
    rows = [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]}, {"prompt": "r"}]
    write_rows(tmp_path / "p.jsonl", rows)
    for side in ("following", "breaking"):
        sampled = cai(
            "sample", "p.jsonl", "-o", f"{side}.jsonl", "-m", "m", "--contrast", side, "--max-new-tokens", "4"
        )
        assert sampled.code == 0, sampled.stderr
        assert [row["own_system"] for row in rows_in(tmp_path / f"{side}.jsonl")] == ["Be brief.", None]
    assert cai("pairs", "following.jsonl", "breaking.jsonl", "-o", "prefs.jsonl").code == 0
    prompts = [[m["content"] for m in row["prompt"]] for row in rows_in(tmp_path / "prefs.jsonl")]
    assert prompts == [["Be brief.", "q"], ["r"]]


def test_a_teacher_with_a_system_prompt_is_paired_with_the_model_without_one(cai: Cai, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be warm."}
    teacher = reply("Welcome!", prompt=[system, {"role": "user", "content": "q"}])
    assert paired(cai, tmp_path, [teacher], [reply("Yes.")]).code == 0
    (row,) = rows_in(tmp_path / "prefs.jsonl")
    assert [m["role"] for m in row["prompt"]] == ["user"]
    assert cai("eval", "agreement", "prefs.jsonl").code == 0


def test_pairs_that_teach_nothing_are_skipped_and_counted(cai: Cai, tmp_path: Path) -> None:
    said = [("Gladly so.", "gladly so", "stop"), ("Come in.", "Go away now.", "length"), ("Hello.", "Never.", "stop")]
    first = [reply(a, "following", id=str(n), finish_reason=end) for n, (a, _, end) in enumerate(said)]
    second = [reply(b, "breaking", id=str(n)) for n, (_, b, _) in enumerate(said)]
    words = ("--skip-cut-off", "--max-similarity", "0.5")
    assert paired(cai, tmp_path, [*first, reply("Alone.", "following", id="x")], second, *words).code == 0
    assert manifest_of(tmp_path / "prefs.jsonl")["counts"]["skipped_reasons"] == {
        "cut off at the length limit": 1,
        "nearly identical replies": 1,
        "no other reply": 1,
    }
    assert [row["id"] for row in rows_in(tmp_path / "prefs.jsonl")] == ["2/0"]


def test_without_filters_only_empty_and_identical_replies_make_no_pair() -> None:
    config = PairsConfig(input=["a", "b"], output="o")
    one, other = (load_row(ContrastSample, reply(text, "following")) for text in ("Yes.", "yes!"))
    assert reply_problem(one, other, config) is None
    assert reply_problem(one, one, config) == "identical replies"


@pytest.mark.parametrize(
    "second",
    [
        reply("No.", "following"),
        reply("No."),
        reply("No.", "breaking", principle_id="honest"),
        reply("No.", "breaking", prompt=[{"role": "user", "content": "another"}]),
        reply("No.", "breaking", own_system="Be brief."),
    ],
)
def test_replies_that_do_not_belong_together_are_refused(tmp_path: Path, second: dict[str, Any]) -> None:
    files = [
        str(write_rows(tmp_path / f"{n}.jsonl", [row])) for n, row in enumerate((reply("Yes.", "following"), second))
    ]
    with pytest.raises(InvalidRow) as error:
        list(pair_items(PairsConfig(input=files, output="o")))
    assert (error.value.code, error.value.line) == ("invalid-row", 1)


def test_a_run_that_skips_every_row_is_done_and_says_so_as_in_other_stages(cai: Cai, tmp_path: Path) -> None:
    done = paired(cai, tmp_path, [reply("Same.")], [reply("Same.")])
    assert (done.code, "all 1 rows were skipped" in done.stderr) == (0, True)
    assert manifest_of(tmp_path / "prefs.jsonl")["counts"]["skipped"] == 1
