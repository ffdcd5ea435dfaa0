"""A run file, the plan of one, and a run that is killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.run_file import load_run

PIPELINE = """\
name: pipeline
model: scripted:script.jsonl
seed: 3
steps:
  samples: {command: sample, input: prompts.jsonl, n: 2}
  revisions: {command: critique-revise, input: "@samples", rounds: 1}
  helpful: {command: sample, input: helpful.txt}
  preferences: {command: label-prefs, input: "@samples", both-orders: false}
"""


def planned(folder: Path, steps: str, head: str = "name: n\n") -> list[Step]:
    path = folder / "run.yaml"
    path.write_text(f"{head}steps:\n{steps}")
    return plan(load_run(path), path, Path("out"))


def start_and_kill(folder: Path, run_file: str, until: Path, sent: signal.Signals) -> int:
    """Start a run and send a signal once the file `until` is not empty. Returns the exit code, once every child has
    ended."""
    child = subprocess.Popen(
        [sys.executable, "-m", "cai_cli", "run", run_file, "--out", "out"], cwd=folder, stderr=subprocess.DEVNULL
    )
    while not (until.exists() and until.stat().st_size) and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(sent)
    code = child.wait(timeout=30)
    lock = until.with_name(until.name.replace(".partial", ".lock"))
    if lock.exists():
        with FileLock(lock, timeout=60):  # the children have let it go
            pass
    return code
