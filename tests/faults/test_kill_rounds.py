"""SIGKILL to `cai run` and its step, within rounds and between them: the same bytes and parameters in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cai, Ran
from helpers import Json, largest_difference, rows_in
from rounds_world import plant

# The run is killed when each of these appears: within a round's training, between rounds, within the next training.
KILLED_AT = ("dpo@1.partial/checkpoint-2", "dpo@1.manifest.json", "dpo@2.partial/checkpoint-2")
COMMAND = (sys.executable, "-m", "cai_cli", "run", "run.yaml", "--quiet", "--out")


def kill_when(appears: str, folder: Path) -> None:
    """Start the run in `folder`/out, and kill it with its step when a file appears."""
    run = subprocess.Popen([*COMMAND, "out"], cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (folder / "out" / appears).exists():
        assert run.poll() is None, f"the run ended before {appears}"
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def rounds_of(folder: Path) -> Json:
    """What run.json records about the rounds, without their time."""
    report: Json = json.loads((folder / "run.json").read_text())["rounds"]["rounds"]
    return {**report, "rounds": [{**entry, "hours": None} for entry in report["rounds"]]}


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_kills_within_and_between_rounds_lead_to_the_same_bytes_and_parameters(
    cai: Cai, tmp_path: Path, ran: Ran
) -> None:
    plant(cai, tmp_path, repeat=2, steps=4)
    subprocess.run([*COMMAND, "calm"], cwd=tmp_path, check=True, capture_output=True)
    for appears in KILLED_AT:
        kill_when(appears, tmp_path)
    subprocess.run([*COMMAND, "out"], cwd=tmp_path, check=True, capture_output=True)
    calm, out = tmp_path / "calm", tmp_path / "out"
    files = sorted(file.name for file in calm.glob("*.jsonl"))
    assert files == sorted(file.name for file in out.glob("*.jsonl"))
    assert [file for file in files if (calm / file).read_bytes() != (out / file).read_bytes()] == []
    for model in ("dpo@1", "dpo@2"):
        assert largest_difference(calm / model, out / model) == 0
        for file in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl"):
            assert rows_in(calm / model / file) == rows_in(out / model / file)
    assert rounds_of(calm) == rounds_of(out)
    ran(f"rounds: {len(KILLED_AT)} kills")
