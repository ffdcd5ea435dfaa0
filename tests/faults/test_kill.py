"""After repeated SIGKILLs the output has the bytes of an undisturbed run, and no finished row is requested twice."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The real command line; every request to the scripted engine logs the number of its row.
LOGGED = r"""
import os, re
from cai_cli.cli.app import main
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.data.transcripts import render_transcript
log, answer = os.open("asked.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), ScriptedEngine._line
def logged(self, text):
    flat = text if isinstance(text, str) else render_transcript(text)
    os.write(log, re.findall(r"question (\d+)", flat)[-1].encode() + b"\n")
    return answer(self, text)
ScriptedEngine._line = logged
main()
"""
STAGES = {
    "sample": ["sample", "prompts.jsonl"],
    "critique-revise": ["critique-revise", "samples.jsonl", "--rounds", "2"],
    "label-prefs": ["label-prefs", "pairs.jsonl", "--one-order"],
}
ROWS = 60


def write_inputs(folder: Path, seconds: float) -> None:
    """Every fifth row ends up rejected."""

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sample(i: int, k: int) -> dict[str, object]:
        return {
            "id": f"p{i}", "prompt": [{"role": "user", "content": f"question {i}"}], "kind": None, "source": None,
            "sample_index": k, "completion": [{"role": "assistant", "content": f"{'bad' if i % 5 == 0 else k}"}],
            "finish_reason": "stop",
        }  # fmt: skip

    folder.mkdir()
    bad = [{"contains": f"question {i}\n", "replies": [""], "seconds": seconds} for i in range(0, ROWS, 5)]
    write("prompts.jsonl", [{"id": f"p{i}", "prompt": f"question {i}\n"} for i in range(ROWS)])
    write("samples.jsonl", [sample(i, 0) for i in range(ROWS)])
    write("pairs.jsonl", [{**sample(i, k), "completion": [{"role": "assistant", "content": f"{i} {k}"}]}
                          for i in range(ROWS) for k in range(2)])  # fmt: skip
    talk = [{**row, "contains": f"{str(row['contains']).rstrip()}\n\nAssistant: bad"} for row in bad]
    rest = {"replies": ["fine.", "good.", "well."], "scores": [-0.2, -1.7], "seconds": seconds}
    write("script.jsonl", [*bad, *talk, rest])


def command(stage: str) -> list[str]:
    words = [*STAGES[stage], "-o", "out.jsonl", "--model", "scripted:script.jsonl", "--batch-size", "3"]
    return [sys.executable, "-c", LOGGED, *words]


def finished(folder: Path) -> set[str]:
    """Numbers of the rows of which a whole line is on disk."""
    found = set()
    for name in ("out.jsonl.partial", "out.jsonl.rejected.jsonl"):
        path = folder / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for row in map(json.loads, lines):
            found |= set(re.findall(r"^p(\d+)", row.get("key") or row["id"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_five_kills_end_in_the_same_bytes_and_no_finished_row_is_requested_again(stage: str, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    write_inputs(calm, 0)
    subprocess.run(command(stage), cwd=calm, check=True, capture_output=True)
    expected = {p.name: p.read_bytes() for p in calm.glob("out.jsonl*") if "manifest" not in p.name}

    write_inputs(killed, 0.01)
    log, moments = killed / "asked.log", random.Random(stage)
    for _ in range(5):
        before = finished(killed)
        log.unlink(missing_ok=True)
        child = subprocess.Popen(command(stage), cwd=killed, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(finished(killed)) < len(before) + 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (killed / "out.jsonl").exists(), "killed too late"
        assert len(finished(killed)) > len(before)
        assert not before & set(log.read_text().split())
    before = finished(killed)
    log.unlink()
    last = subprocess.run(command(stage), cwd=killed, check=True, capture_output=True, text=True)
    assert f"{len(before)} rows are finished" in last.stderr
    assert set(log.read_text().split()) == {str(i) for i in range(ROWS)} - before
    assert {p.name: p.read_bytes() for p in killed.glob("out.jsonl*") if "manifest" not in p.name} == expected
    counts = [json.loads((f / "out.jsonl.manifest.json").read_text())["counts"] for f in (calm, killed)]
    assert counts[0] == counts[1]
    if stage != "label-prefs":
        assert counts[0]["rejected"] == ROWS / 5
