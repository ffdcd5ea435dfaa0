"""Hostile rows, principles, run files and models in every command that prints: nothing controls the terminal."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Cai
from helpers import sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from report_run import make_run

from cai_cli.common.console import safe, safe_json

STEERING = {
    "colour": "\x1b[5;35;44mpwned",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;pwned\x07",
    "link": "\x1b]8;;https://example.com\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cHduZWQ=\x07",
    "device": "\x1bPq#0~\x1b\\",
    "8-bit": "\x9b31m and \x9d0;pwned\x9c",
    "overwrite": "good\r\x08\x08\x7fevil",
    "nul": "a\x00b\x0c\x0b",
    "right to left": "\u202egnp.exe\u202c \u2066a\u2069",
    "markup": "[bold red]loud[/bold red] [/] [link=https://example.com]x[/link] [@click=app.quit]y[/] :smile: \\[",
    "html": "<script>window.pwned = 1</script><img src=x onerror=alert(1)> [x](javascript:alert(1))",
    "template": "{{ 7 * 7 }} {0.__class__} %(x)s ${HOME} $(id)",
}
ALL = " ".join(STEERING.values())
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
JUDGE = ("--model", "scripted:judge.jsonl", "--one-order")


def constitution(kind: str) -> str:
    texts = ("comparison",) if kind == "preference" else ("critique", "revision")
    principle = {"id": ALL, "theme": ALL, **dict.fromkeys(texts, ALL)}
    return json.dumps({"kind": kind, "name": ALL, "principles": [principle]})


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    rows = [{**sample_row(1, k, f"{ALL} {k}"), "id": ALL, "source": ALL, "prompt": [{"role": "user", "content": ALL}]} for k in range(2)]  # fmt: skip
    write_rows(tmp_path / "samples.jsonl", rows)
    write_rows(tmp_path / "other.jsonl", [rows[1] | {"sample_index": 0}])
    write_rows(tmp_path / "prompts.jsonl", [{"id": ALL, "prompt": ALL, "source": ALL}])
    write_rows(tmp_path / "script.jsonl", [{"replies": [ALL]}])
    write_rows(tmp_path / "fails.jsonl", [{"replies": [""]}])
    write_rows(tmp_path / "judge.jsonl", [{"scores": [-0.1, -3.0], "replies": [ALL]}])
    write_rows(tmp_path / "ties.jsonl", [{"scores": [-1.0, -1.0], "replies": [ALL]}])
    write_rows(tmp_path / "unknown.jsonl", [{"prompt": "a", ALL: 1}])
    write_rows(tmp_path / "wrong.jsonl", [{"prompt": "a", "kind": ALL}])
    write_rows(tmp_path / "unread.jsonl", [{"id": ALL, "prompt": [], "completion": ALL, "history": [ALL]}])
    (tmp_path / "twice.jsonl").write_text(f'{{"prompt": "a", {json.dumps(ALL)}: 1, {json.dumps(ALL)}: 2}}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{' + ALL.replace("\n", "") + "\n")
    (tmp_path / "critique.yaml").write_text(constitution("critique-revision"))
    (tmp_path / "preference.yaml").write_text(constitution("preference"))
    (tmp_path / "raw.yaml").write_text(f"kind: {ALL}\n")
    run_file = {
        "name": "r",
        "model": f"scripted:{ALL}",
        "steps": {"s": {"command": "sample", "input": "prompts.jsonl"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file))
    run_file["steps"] = {"s": {"command": ALL, "input": ALL}}
    (tmp_path / "command.yaml").write_text(yaml.safe_dump(run_file))
    (tmp_path / "name.yaml").write_text(yaml.safe_dump({**run_file, "name": ALL}))
    (tmp_path / "option.yaml").write_text(
        yaml.safe_dump({**run_file, "steps": {"s": {"command": "sample", "input": "prompts.jsonl", ALL: ALL}}})
    )


COMMANDS: dict[str, tuple[str, ...]] = {
    "show": ("show", "samples.jsonl"),
    "show of an invalid row": ("show", "unread.jsonl"),
    "show of invalid JSON": ("show", "broken.jsonl"),
    "stats": ("stats", "samples.jsonl"),
    "stats of bad lines": ("stats", "broken.jsonl"),
    "sort": ("sort", "samples.jsonl", "-o", "sorted.jsonl"),
    "dedup": ("dedup", "samples.jsonl", "-o", "distinct.jsonl"),
    "sample": ("sample", "prompts.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"),
    "a rejected row": ("sample", "prompts.jsonl", "--model", "scripted:fails.jsonl", "-o", "-"),
    "an unknown field": ("sample", "unknown.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"),
    "a wrong value": ("sample", "wrong.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"),
    "a field twice": ("sample", "twice.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"),
    "a bad line": ("sample", "broken.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"),
    "bad lines skipped": ("sample", "broken.jsonl", "--model", "scripted:script.jsonl", "-o", "-", "--skip-invalid"),
    "a file that is not there": ("sample", f"{STEERING['colour']}.jsonl", "--model", "scripted:script.jsonl"),
    "a model that is not there": ("sample", "prompts.jsonl", "--model", ALL.replace("\0", "")),
    "critique": ("critique", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl", "--constitution", "critique.yaml"),
    "a critique that fails": ("critique", "samples.jsonl", "--model", "scripted:fails.jsonl", "-o", "-", "--constitution", "critique.yaml"),
    "critique-revise": ("critique-revise", "samples.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl", "--rounds", "1"),
    "label-prefs": ("label-prefs", "samples.jsonl", *JUDGE, "-o", "out.jsonl", "--constitution", "preference.yaml"),
    "a tie": ("label-prefs", "samples.jsonl", "--model", "scripted:ties.jsonl", "-o", "-", "--constitution", "preference.yaml"),
    "eval compare": ("eval", "compare", "samples.jsonl", "other.jsonl", "--judge", "scripted:judge.jsonl", "-o", "out.jsonl"),
    "principles list": ("principles", "list", "critique.yaml", "preference.yaml"),
    "principles show": ("principles", "show", "--constitution", "critique.yaml", "--constitution", "preference.yaml"),
    "principles validate": ("principles", "validate", "critique.yaml", "raw.yaml"),
    "a principle that is not there": ("principles", "show", ALL.replace("\0", "")),
    "run": ("run", "run.yaml"),
    "run --dry-run": ("run", "run.yaml", "--dry-run"),
    "a command that is none": ("run", "command.yaml"),
    "an option that is none": ("run", "option.yaml"),
    "a name that is none": ("run", "name.yaml"),
    "export": ("export", "samples.jsonl", "-o", "ds"),
    "merge": ("merge", "samples.jsonl", "-o", "out.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_no_terminal_control_is_printed(what: str, cai: Cai) -> None:
    done = cai(*COMMANDS[what])
    if what not in ("sample", "sort", "dedup"):
        assert done.stdout + done.stderr
    rows_on_stdout = "-" in COMMANDS[what]
    assert not FORBIDDEN.findall(done.stderr + ("" if rows_on_stdout else done.stdout))
    assert "Traceback" not in done.stderr


def test_the_text_of_a_row_is_printed(cai: Cai) -> None:
    printed = cai("show", "samples.jsonl").stdout
    for name in ("markup", "html", "template"):
        assert STEERING[name] in printed
    assert r"\x1b]8;;https://example.com" in printed


def test_an_audit_and_its_parts_print_no_control(cai: Cai) -> None:
    assert cai(*COMMANDS["label-prefs"]).code == 0
    for words in (("eval", "agreement", "out.jsonl"), ("show", "out.jsonl"), ("stats", "out.jsonl")):
        done = cai(*words)
        assert done.code == 0, done.stderr
        assert not FORBIDDEN.findall(done.stdout + done.stderr)


def test_an_evaluation_of_hostile_questions_prints_no_control(cai: Cai, tmp_path: Path) -> None:
    question = {"id": ALL, "prompt": ALL, "corrects": [ALL], "incorrects": [f"{ALL}!"], "source": ALL}
    write_rows(tmp_path / "questions.jsonl", [question])
    done = cai(
        "eval", "hhh", "questions.jsonl", "--model", "scripted:judge.jsonl", "-o", "out.jsonl", "--prompt-format", "raw"
    )
    assert not FORBIDDEN.findall(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def test_a_chat_prints_replies_and_names_as_text(cai: Cai, tmp_path: Path) -> None:
    named = f"{STEERING['colour']}{STEERING['right to left']}.jsonl"
    (tmp_path / named).write_bytes((tmp_path / "script.jsonl").read_bytes())
    done = cai("chat", "scripted:script.jsonl", f"scripted:{named}", stdin=f"hello\n/{ALL}\n".encode())
    assert done.code == 0, done.stderr
    assert STEERING["markup"] in done.stdout
    assert not FORBIDDEN.findall(done.stdout + done.stderr)


def test_a_report_s_problems_are_text_on_the_terminal_and_on_the_page(cai: Cai, tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", hostile=True)
    (run / "evil.compare.json").write_text(json.dumps({"models": [ALL], "ratings": ALL}))
    with (run / "revisions.jsonl").open("ab") as file:
        file.write(json.dumps({ALL: ALL}).encode() + b"\n")
    done = cai("report", str(run))
    assert done.code == 0, done.stderr
    assert not FORBIDDEN.findall(done.stderr + done.stdout)
    page = (run / "report.html").read_text()
    assert not FORBIDDEN.findall(page)
    assert "<img" not in page
    assert "javascript:" not in re.sub(r"[^\"'=]javascript:", "", page)


@given(st.text())
def test_safe_text_holds_no_control_and_keeps_the_rest(text: str) -> None:
    made = safe(text)
    assert not FORBIDDEN.findall(made)
    assert safe(made) == made
    assert made == text or FORBIDDEN.search(text)


# --- on a terminal of its own ------------------------------------------------------------------------------------------


def on_terminal(words: list[str], folder: Path, stdin: bytes = b"") -> str:
    """What a command writes to a terminal, both streams."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PAGER": "cat"}
    command = [sys.executable, "-m", "cai_cli", *words]
    child = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    assert child.stdin
    child.stdin.write(stdin)
    child.stdin.close()
    read = b""
    try:
        while block := os.read(master, 65536):
            read += block
    except OSError:  # the other end is closed
        pass
    child.wait(timeout=60)
    os.close(master)
    return read.decode()


# What rich itself writes: colours, cursor up, erase a line, hide and show the cursor; the terminal makes \n into \r\n.
OURS = re.compile("\x1b\\[(?:[0-9;]*m|1A|2K|\\?25[lh])|\r")


@pytest.mark.parametrize(
    "words",
    [
        ["show", "samples.jsonl"],
        ["sample", "prompts.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"],
        ["sample", "unknown.jsonl", "--model", "scripted:script.jsonl", "-o", "out.jsonl"],
        ["sample", "prompts.jsonl", "--model", "scripted:script.jsonl", "-o", "-"],
        ["critique", "samples.jsonl", "--model", "scripted:fails.jsonl", "-o", "-", "--constitution", "critique.yaml"],
        ["chat", "scripted:script.jsonl", "scripted:judge.jsonl"],
        ["principles", "show", "--constitution", "critique.yaml"],
        ["run", "run.yaml"],
    ],
    ids=" ".join,
)
def test_on_a_terminal_only_our_own_colours_and_cursor_moves_are_written(words: list[str], tmp_path: Path) -> None:
    written = on_terminal(words, tmp_path, stdin=b"hello\n")
    assert written
    assert "\x1b[5;35;44m" not in written
    assert not FORBIDDEN.findall(OURS.sub("", written))


def test_rows_on_a_terminal_are_the_rows_of_a_pipe_in_other_letters(cai: Cai, tmp_path: Path) -> None:
    words = ["sample", "prompts.jsonl", "--model", "scripted:script.jsonl", "-o", "-", "--quiet"]
    piped, printed = cai(*words).stdout, OURS.sub("", on_terminal(words, tmp_path))
    assert not re.findall("[\x00-\x09\x0b-\x1f]", piped)
    assert FORBIDDEN.findall(piped)
    assert not FORBIDDEN.findall(printed)
    assert json.loads(printed) == json.loads(piped)


@given(st.text())
def test_json_without_controls_means_the_same(text: str) -> None:
    line = json.dumps(text, ensure_ascii=False).encode()
    assert json.loads(safe_json(line)) == text
    assert not FORBIDDEN.findall(safe_json(line).decode())
