"""`cai show`: any rows are readable and safe on a terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from conftest import Cai
from helpers import sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from report_run import HOSTILE, make_run, manifest, training_counts

from cai_cli.cli.show import row_text
from cai_cli.runtime.manifest import write_json

TURN = {"round": 1, "principle_id": "kind", "critique": "too blunt", "response": "go away"}


@pytest.mark.parametrize("torn", [b"", b'{"id": "p3", "prom'])
def test_an_unfinished_output_is_shown_up_to_its_torn_last_line(torn: bytes, cai: Cai, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "o.jsonl.partial", [sample_row(1), sample_row(2)])
    path.write_bytes(path.read_bytes() + torn)
    write_json(tmp_path / "o.jsonl.partial.manifest.json", {"status": "running", "provenance": {"stage": "sample"}})
    done = cai("show", "o.jsonl.partial")
    assert (done.code, "an unfinished output of cai sample" in done.stdout) == (0, True)
    assert "show: 2 rows" in done.stderr
    path.write_bytes(torn + b"\n" + path.read_bytes())
    assert cai("show", "o.jsonl.partial").code == bool(torn)  # a broken line before others is an error


def test_the_record_of_a_run_is_shown_step_by_step(cai: Cai, tmp_path: Path) -> None:
    step = {"key": "2:x", "argv": ["sample", "p.jsonl", "-o", "out/a.jsonl"], "status": "done", "seconds": 3.5}
    planned = {"a": step["argv"], "b": ["sft", "out/a.jsonl", "-o", "out/b"]}
    write_json(tmp_path / "run.json", {"steps": {"a": step}, "planned": planned})
    done = cai("show", "run.json")
    assert "cai sample p.jsonl -o out/a.jsonl" in done.stdout
    assert "not started" in done.stdout
    assert "1 rows; more follow" in cai("show", "run.json", "--limit", "1").stderr


def test_a_revision_reads_from_the_prompt_to_the_last_revision(cai: Cai, tmp_path: Path) -> None:
    rows = [
        {**sample_row(1, reply="gladly"), "history": [TURN, {**TURN, "round": 2, "critique": None, "response": "no"}]}
    ]
    write_rows(tmp_path / "r.jsonl", rows)
    done = cai("show", "r.jsonl")
    assert done.code == 0
    assert done.stdout.splitlines()[0].startswith("── p1/0 ──")
    assert [line for line in done.stdout.splitlines()[1:] if line] == [
        "Human  question 1",
        "reply before round 1  go away",
        "critique 1 (kind)  too blunt",
        "reply before round 2  no",
        "round 2 (kind)  revised without a critique",
        "revision 2  gladly",
        "source test · finish_reason stop",
    ]
    assert done.stderr.strip() == "show: 1 rows"


def test_votes_and_rejected_rows_are_readable(cai: Cai, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=2)
    text = cai("show", "run/preferences.jsonl").stdout
    assert "run/preferences.jsonl: made by cai label-prefs, 5 in = 2 out + 3 rejected + 0 skipped" in text
    assert "chosen first, " in text
    assert "% for the first (choice)" in text
    row = json.dumps(sample_row(7))
    write_rows(folder / "x.rejected.jsonl", [{"key": "p7/0", "reason": "empty reply", "row": row}])
    text = cai("show", "run/x.rejected.jsonl").stdout
    assert text.startswith("── p7/0 ")
    assert "rejected  empty reply" in text
    assert "Human  question 7" in text


@pytest.mark.parametrize("file", ["rl-cai/metrics.jsonl", "samples.jsonl", "after.jsonl"])
def test_every_kind_of_row_is_shown_with_every_value(cai: Cai, tmp_path: Path, file: str) -> None:
    make_run(tmp_path / "run", rows=3)
    rows = [json.loads(line) for line in (tmp_path / "run" / file).read_text().splitlines()]
    text = cai("show", f"run/{file}").stdout
    for row in rows:
        for value in row.values():
            if isinstance(value, str | float):
                assert (value if isinstance(value, str) else orjson.dumps(value).decode()) in text


def test_rows_are_picked_by_number_text_and_id(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "s.jsonl", [sample_row(i, j) for i in range(5) for j in range(2)])

    def heads(*words: str) -> list[str]:
        return [line.split()[1] for line in cai("show", "s.jsonl", *words).stdout.splitlines() if line.startswith("──")]

    assert heads("--n", "2") == ["p0/0", "p0/1"]
    assert heads("--grep", "QUESTION [34]", "-n", "3") == ["p3/0", "p3/1", "p4/0"]
    assert heads("--id", "p2") == ["p2/0", "p2/1"]
    assert heads("--id", "p2/1") == ["p2/1"]
    assert "show: 2 rows; more follow" in cai("show", "s.jsonl", "--n", "2").stderr
    assert "more follow" not in cai("show", "s.jsonl", "--n", "10").stderr
    assert cai("show", "s.jsonl", "--grep", "(").code == 2
    assert cai("show", "-", stdin=(tmp_path / "s.jsonl").read_bytes()).stdout.count("── p") == 10


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_a_model_comparison_shows_both_replies_with_their_models(cai: Cai, tmp_path: Path) -> None:
    vote = {"principle_id": "kind", "method": "choice", "order": "ba", "p_first": 0.25, "rationale": None}
    row = {
        "id": "p0/0 base:tuned", "prompt_id": "p0", "sample_index": 0, "prompt": [{"role": "user", "content": "why"}],
        "kind": None, "model_a": "base", "model_b": "tuned", "a": reply("go away"), "b": reply("gladly"),
        "score_a": -1.5, "score_b": 0.25, "p_a": 0.2, "votes": [vote],
    }  # fmt: skip
    write_rows(tmp_path / "d.jsonl", [row, {**row, "id": "p1/0 base:tuned", "prompt_id": "p1"}])
    lines = cai("show", "d.jsonl", "--id", "p0").stdout.splitlines()
    assert lines[0].startswith("── p0/0 base:tuned ──")
    assert [line for line in lines[1:] if line] == [
        "Human  why",
        "base (score -1.5)  go away",
        "tuned (score 0.25)  gladly",
        "vote  kind: tuned first, 25.0% for the first (choice)",
        "prompt_id p0 · p_a 0.2",
    ]


def test_the_directory_of_a_model_names_the_files_that_can_be_shown(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    for name in ("config.json", "samples.jsonl", "metrics.jsonl"):
        (tmp_path / "rl" / name).write_text("{}")
    (tmp_path / "rl.manifest.json").write_text(json.dumps(manifest("rl", training_counts(5))))
    done = cai("show", "rl")
    assert (done.code, done.error) == (2, "cannot-read")
    assert "rl/metrics.jsonl, rl/samples.jsonl" in done.stderr


def test_no_row_can_steer_the_terminal(cai: Cai, tmp_path: Path) -> None:
    text = "[red]not markup[/red] [link=x]:smile:"
    write_rows(tmp_path / "s.jsonl", [sample_row(i, reply=t) for i, t in enumerate([*HOSTILE, text])])
    printed = cai("show", "s.jsonl").stdout
    for steering in "\x00\x1b\x07\u202e\u2066":
        assert steering not in printed
    assert text in printed
    assert r"\x1b[31mred" in printed


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["id", "prompt", "history", "votes", "completion", "critique", "row", "reason", "chosen", "model_a", "model_b", "a", "b", "x"]), c), max_leaves=12))  # fmt: skip
def test_any_json_value_is_shown(value: object) -> None:
    assert "\x1b" not in row_text(value, 3).plain


def on_terminal(words: list[str], folder: Path, **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment}
    child = subprocess.Popen([sys.executable, "-m", "cai_cli", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.DEVNULL, env=env)  # fmt: skip
    os.close(slave)
    read = b""
    try:
        while block := os.read(master, 65536):
            read += block
    except OSError:  # the other end is closed
        pass
    assert child.wait(timeout=60) == 0
    os.close(master)
    return read.decode()


def test_on_a_terminal_rows_go_to_the_pager(tmp_path: Path) -> None:
    write_rows(tmp_path / "s.jsonl", [sample_row(i) for i in range(500)])
    assert on_terminal(["show", "s.jsonl"], tmp_path, PAGER="head -n 1").count("── p") == 1
    assert on_terminal(["show", "s.jsonl"], tmp_path, PAGER="no-such-pager").count("── p") == 500
    assert "\x1b[" in on_terminal(["show", "s.jsonl"], tmp_path, PAGER="cat")


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
    write_rows(tmp_path / "s.jsonl", [sample_row(i) for i in range(5000)])
    command = f"{sys.executable} -m cai_cli show s.jsonl | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1:] == ["141", ""]
    assert done.stderr == ""
