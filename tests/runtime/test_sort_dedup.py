"""Sorting and de-duplication are exact however little memory they have; stats count what is there."""

import json
from pathlib import Path

import orjson
import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.metrics.dataset_stats import Stats
from cai_cli.runtime import sort_dedup
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.sort_dedup import SortBy, distinct_lines, sort_key, sorted_lines

ids = st.one_of(st.integers(0, 20), st.text(max_size=3))
rows_strategy = st.lists(
    st.fixed_dictionaries({"id": ids, "sample_index": st.integers(0, 3), "prompt": st.text(max_size=30)}), max_size=40
)


@given(rows_strategy, st.sampled_from(SortBy), st.integers(1, 400))
def test_sorting_in_runs_of_any_size_is_sorting_at_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Json], by: SortBy, run_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sort_dedup, "RUN_BYTES", run_bytes)
        lines = list(sorted_lines(rows, sort_key(by), tmp_path_factory.mktemp("runs")))
    assert [orjson.loads(line) for line in lines] == sorted(rows, key=sort_key(by))


@given(st.lists(st.sampled_from(["a", "b", "c", " a"]), max_size=12))
def test_the_first_row_of_each_prompt_is_kept_and_the_others_are_counted(prompts: list[str]) -> None:
    rows: list[Json] = [{"id": i, "prompt": p} for i, p in enumerate(prompts)]
    counts = Counts()
    kept = [orjson.loads(line) for line in distinct_lines(rows, counts)]
    assert kept == [row for i, row in enumerate(rows) if row["prompt"] not in prompts[:i]]
    assert len(kept) + counts.skipped.total() == len(rows)


def test_scattered_samples_sorted_by_id_can_be_labelled(cai: Cai, tmp_path: Path) -> None:
    samples = [sample_row(i, k) for k in range(2) for i in range(12)]
    write_rows(tmp_path / "in.jsonl", samples)
    write_rows(tmp_path / "script.jsonl", [{"scores": [-0.1, -3.0]}])
    label = ("label-prefs", "--model", "scripted:script.jsonl", "--one-order", "-o", "prefs.jsonl")
    assert "sort by id" in cai(*label, "in.jsonl").stderr
    done = cai("sort", "in.jsonl", "-o", "sorted.jsonl", "--json")
    assert json.loads(done.stdout)["out"] == 24
    assert sorted(map(str, rows_in(tmp_path / "sorted.jsonl"))) == sorted(map(str, samples))
    assert cai(*label, "sorted.jsonl", "--overwrite").code == 0
    assert "nothing to do" in cai("sort", "in.jsonl", "-o", "sorted.jsonl").stderr
    assert "settings.by: id -> length" in cai("sort", "in.jsonl", "-o", "sorted.jsonl", "--by", "length").stderr
    assert {p.name for p in tmp_path.glob("sorted*")} <= {
        "sorted.jsonl",
        "sorted.jsonl.manifest.json",
        "sorted.jsonl.lock",
    }


def test_dedup_keeps_rows_as_they_are_and_says_how_many_it_left_out(cai: Cai, tmp_path: Path) -> None:
    rows: list[Json] = [
        {"prompt": "a", "kind": "helpful"},
        {"id": "x", "prompt": [{"role": "user", "content": "a"}]},
        {"chosen": "\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: d"},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    write_rows(tmp_path / "in.jsonl", rows)
    done = cai("dedup", "in.jsonl", "-o", "out.jsonl")
    assert "4 in = 2 out + 0 rejected + 2 skipped (2 same prompt as an earlier line)" in done.stderr
    assert rows_in(tmp_path / "out.jsonl") == [rows[0], rows[2]]
    assert manifest_of(tmp_path / "out.jsonl")["counts"]["skipped"] == 2
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    refused = cai("dedup", "bad.jsonl", "-o", "never.jsonl")
    assert (refused.code, "bad.jsonl:2: no prompt" in refused.stderr) == (1, True)
    assert not (tmp_path / "never.jsonl").exists()
    piped = cai("dedup", "-", "-o", "out.jsonl", stdin=b'{"prompt": "z"}\n')
    assert piped.code == 1
    assert rows_in(tmp_path / "out.jsonl") == [rows[0], rows[2]]


def test_an_output_that_is_an_input_is_refused(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for command in ("sort", "dedup"):
        refused = cai(command, "in.jsonl", "-o", "in.jsonl", "--overwrite")
        assert (refused.code, "both input and output" in refused.stderr) == (1, True)
    assert rows_in(tmp_path / "in.jsonl") == [{"prompt": "a"}]


def test_stats_count_rows_repeats_kinds_principles_rounds_and_lengths(cai: Cai, tmp_path: Path) -> None:
    turn = {"round": 1, "principle_id": "kind", "critique": "c", "response": "r"}
    rows = [{**sample_row(i, 0, "r" * i), "kind": "helpful", "history": [turn] * (i % 3)} for i in range(1, 11)]
    rows.append({**rows[0], "sample_index": 1, "kind": None, "source": "\x1b[2Jelse"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    done = cai("stats", "in.jsonl", "--json")
    found = json.loads(done.stdout)
    assert (found["rows"], found["bad_lines"], found["distinct_keys"], found["repeated_keys"]) == (11, 1, 11, 0)
    assert found["first_bad_lines"][0].startswith("in.jsonl:12: ")
    assert (found["distinct_prompts"], found["repeated_prompts"]) == (10, 1)
    assert found["by"]["kind"] == {"helpful": 10, "null": 1}
    assert found["by"]["rounds"] == {"1": 5, "2": 3, "0": 3}
    assert found["by"]["principle_id"] == {"kind": 11}
    lengths = found["lengths"]["completion"]
    assert (lengths["n"], lengths["p0"], lengths["p50"], lengths["p100"]) == (11, 1, 5, 10)
    shown = cai("stats", "in.jsonl").stdout
    assert "rows 11" in shown
    assert "\x1b" not in shown


def test_stats_of_preferences_and_of_rejected_rows(cai: Cai, tmp_path: Path) -> None:
    vote = {"principle_id": "harm", "method": "choice", "order": "ab", "p_first": 0.7, "rationale": None}
    base = {"prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": [], "human": None, "source": None}
    prefs = [{**base, "id": str(i), "p_chosen": p, "votes": [vote, vote]} for i, p in enumerate((0.5, 0.74, 0.75, 1.0))]
    write_rows(tmp_path / "prefs.jsonl", prefs)
    found = json.loads(cai("stats", "prefs.jsonl", "--json").stdout)
    assert [b["rows"] for b in found["p_chosen"]] == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found["by"]["principle_id"] == {"harm": 4}
    assert "p_chosen" in cai("stats", "prefs.jsonl").stdout
    write_rows(
        tmp_path / "r.jsonl", [{"key": f"line {i}", "reason": f"bad line: r:{i}: x", "row": ""} for i in range(3)]
    )
    assert json.loads(cai("stats", "r.jsonl", "--json").stdout)["by"]["reason"] == {"bad line": 3}


def test_stats_take_for_bad_what_the_stages_take_for_bad(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "q"}\n"bare text"\n3\n[1]\nnull\n{\n')
    (tmp_path / "script.jsonl").write_text('{"replies": ["one."]}\n')
    found = json.loads(cai("stats", "in.jsonl", "--json").stdout)
    words = ("--model", "scripted:script.jsonl", "--skip-invalid", "-o", "out.jsonl", "--json")
    counts = json.loads(cai("sample", "in.jsonl", *words).stdout)
    assert (found["rows"], found["bad_lines"]) == (counts["out"], counts["rejected"]) == (2, 4)


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["id", "prompt", "history", "votes", "p_chosen", "content", "x"]), inner
                )
            ),
            max_leaves=8,
        )
    )
)
def test_stats_take_any_json(values: list[object]) -> None:
    stats = Stats(len)
    for line, value in enumerate(values, 1):
        stats.add(line, value)
    assert stats.as_json()["rows"] == len(values)
