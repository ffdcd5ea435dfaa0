"""Interrupted, terminated, or left by the reader of its output: the code that says so, within seconds, whole lines on
disk, no process left behind, no traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import held, until
from helpers import Json, sample_row, write_rows
from loopback import Loopback, Request, good, hang

CAI = [sys.executable, "-m", "cai_cli"]
PY = f"{shlex.quote(sys.executable)} -m cai_cli"
SLOW = ("--model", "scripted:script.jsonl", "--batch-size", "2")
STAGES = {
    "sample": ("sample", "prompts.jsonl", *SLOW, "-n", "4"),
    "critique-revise": ("critique-revise", "samples.jsonl", *SLOW, "--rounds", "1"),
    "label-prefs": ("label-prefs", "samples.jsonl", *SLOW, "--one-order"),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(30)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(30) for k in range(3)))
    rows: list[Json] = [{"replies": ["one.", "two."], "scores": [-0.1, -3.0], "seconds": 0.02}]
    write_rows(tmp_path / "script.jsonl", rows)
    return tmp_path


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    # A shell that starts the tests in the background leaves SIGINT ignored, and children inherit that.
    return subprocess.Popen(
        [*CAI, *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def holds_rows(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def alive(session: int) -> list[str]:
    """What still runs of a session: command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(state[3]) == session and state[0] != "Z":
                found.append(words.replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize(
    "sent", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM),
             (signal.SIGINT, signal.SIGTERM)], ids=lambda sent: " and ".join(s.name for s in sent)
)  # fmt: skip
@pytest.mark.parametrize(
    "stage", ["sample", *(pytest.param(s, marks=pytest.mark.faults) for s in ("critique-revise", "label-prefs"))]
)
def test_a_signal_or_two_end_a_stage_with_its_code_and_whole_lines(
    stage: str, sent: tuple[signal.Signals, ...], folder: Path
) -> None:
    child = start(*STAGES[stage], "-o", "out.jsonl", cwd=folder)
    until(lambda: holds_rows(folder / "out.jsonl.partial"))
    for one in sent:
        child.send_signal(one)
    _, stderr = child.communicate(timeout=10)
    assert child.returncode in {CODES[one] for one in sent}
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) <= 1
    for line in (folder / "out.jsonl.partial").read_bytes().split(b"\n")[:-1]:
        json.loads(line)
    assert (folder / "out.jsonl.partial").read_bytes().endswith(b"\n")
    assert not alive(child.pid)


@pytest.mark.parametrize("sent", CODES, ids=lambda s: s.name)
def test_a_signal_after_the_end_changes_nothing(sent: signal.Signals) -> None:
    late = (
        f"import atexit, os, sys; atexit.register(lambda: os.kill(os.getpid(), {int(sent)}))\n"
        "from cai_cli.cli.app import main; sys.argv = ['cai', '--version']; main()"
    )
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cai ")


@pytest.mark.faults
@pytest.mark.parametrize("sent", CODES, ids=lambda s: s.name)
def test_a_signal_ends_requests_that_hang(sent: signal.Signals, folder: Path) -> None:
    def behave(request: Request) -> bytes | None:
        return good(request) if request.number < 20 else hang(request)  # type: ignore[func-returns-value]

    with Loopback(behave) as server:
        words = ("sample", "prompts.jsonl", "--model", "openai:m", "--base-url", server.url, "--concurrency", "8")
        child = start(*words, "-o", "out.jsonl", cwd=folder)
        until(lambda: len(server.requests) >= 24)
        child.send_signal(sent)
        _, stderr = child.communicate(timeout=10)
    assert child.returncode == CODES[sent]
    assert "Traceback" not in stderr
    assert "Error" not in stderr
    assert (folder / "out.jsonl.partial").read_bytes().endswith(b"\n")
    assert not alive(child.pid)


@pytest.mark.faults
@pytest.mark.parametrize("group", [False, True], ids=["to it alone", "to the whole group, as a terminal does"])
@pytest.mark.parametrize("sent", CODES, ids=lambda s: s.name)
def test_a_signal_ends_a_pipeline_and_its_step_with_the_signals_code(
    sent: signal.Signals, group: bool, folder: Path
) -> None:
    (folder / "pipeline.yaml").write_text(
        "name: pipeline\nmodel: scripted:script.jsonl\n"
        "steps:\n  samples: {command: sample, input: prompts.jsonl, n: 4, batch-size: 2}\n"
    )
    child = start("run", "pipeline.yaml", "--out", "out", cwd=folder)
    until(lambda: holds_rows(folder / "out/samples.jsonl.partial"))
    (os.killpg if group else os.kill)(child.pid, sent)
    _, stderr = child.communicate(timeout=10)
    assert child.returncode == CODES[sent]
    assert "Traceback" not in stderr
    assert (folder / "out/samples.jsonl.partial").read_bytes().endswith(b"\n")
    assert not alive(child.pid)
    assert not held(folder / "out")


@pytest.mark.parametrize("command", ["sample prompts.jsonl --model scripted:script.jsonl -n 100 --batch-size 2",
                                     "show samples.jsonl", "stats samples.jsonl"])  # fmt: skip
def test_a_reader_that_leaves_after_one_line_makes_no_noise(command: str, folder: Path) -> None:
    # More than a pipe holds, so that `show` still writes when its reader is gone.
    write_rows(folder / "samples.jsonl", (sample_row(i, k) for i in range(1000) for k in range(3)))
    line = f"{PY} {command} | head -1; exit ${{PIPESTATUS[0]}}"
    left = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    assert len(left.stdout.splitlines()) == 1
    assert left.returncode in (0, 141), left
    assert left.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        "sample prompts.jsonl --model scripted:script.jsonl --limit 4",
        "stats samples.jsonl",
        *(pytest.param(text, marks=pytest.mark.faults) for text in (
            "show samples.jsonl", "--version",
            "sample prompts.jsonl --model scripted:script.jsonl --limit 4 -o out.jsonl --json",
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "> /dev/full"])
def test_a_stdout_that_is_closed_or_full_is_one_line_and_no_traceback(closed: str, command: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{PY} {command} {closed}"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception" not in done.stderr, done.stderr
    assert done.returncode == 1, done
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"], done.stderr


def test_with_stderr_closed_a_stage_does_its_work_all_the_same(folder: Path) -> None:
    line = f"{PY} sample prompts.jsonl --model scripted:script.jsonl --limit 4 -o out.jsonl 2>&-"
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 4
