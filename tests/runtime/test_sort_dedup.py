"""Sorting and de-duplication are exact however little memory they have; stats count what is there."""

import json
from pathlib import Path

import orjson
import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st

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
    assert cai(*label, "in.jsonl").error == "rows-out-of-order"
    done = cai("sort", "in.jsonl", "-o", "sorted.jsonl", "--json")
    assert json.loads(done.stdout)["out"] == 24
    assert sorted(map(str, rows_in(tmp_path / "sorted.jsonl"))) == sorted(map(str, samples))
    assert cai(*label, "sorted.jsonl", "--overwrite").code == 0
    assert "nothing to do" in cai("sort", "in.jsonl", "-o", "sorted.jsonl").stderr
    assert cai("sort", "in.jsonl", "-o", "sorted.jsonl", "--by", "length").error == "other-run"
    assert {p.name for p in tmp_path.glob("sorted*")} <= {
        "sorted.jsonl",
        "sorted.jsonl.manifest.json",
        "sorted.jsonl.lock",
    }


def test_dedup_keeps_rows_unchanged_and_counts_those_it_left_out(cai: Cai, tmp_path: Path) -> None:
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
    assert (refused.code, refused.error) == (1, "invalid-row")
    assert not (tmp_path / "never.jsonl").exists()
    piped = cai("dedup", "-", "-o", "out.jsonl", stdin=b'{"prompt": "z"}\n')
    assert piped.code == 1
    assert rows_in(tmp_path / "out.jsonl") == [rows[0], rows[2]]
