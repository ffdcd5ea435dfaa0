"""`cai stats` counts what is in a file, and reports what is not a row."""

import json
from pathlib import Path

from conftest import Cai
from helpers import sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.metrics.dataset_stats import Stats


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


def test_stats_and_stages_find_the_same_lines_invalid(cai: Cai, tmp_path: Path) -> None:
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
