"""Repeats training runs on two gloo processes and counts those that hang or fail.

    python bench/two_processes.py --runs 20

Each run is a whole `torchrun ... -m cai_cli` of sft, train-pm or rl in turn, on a tiny model. A run that takes longer
than `--seconds` counts as hung. Prints a line per run and then `ratio two_processes_failed VALUE`: the share of failed
or hung runs.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers import preference, revision, write_rows  # noqa: E402
from tiny import tiny_model_dir  # noqa: E402

SHARED = ["--model", "tiny", "--learning-rate", "1e-3", "--overwrite", "--quiet", "--num-processes", "2"]
STAGES = {
    "train-pm": ["prefs.jsonl", "-o", "pm", "--epochs", "1", "--save-steps", "2", *SHARED],
    "sft": ["rev.jsonl", "-o", "sft", "--epochs", "1", "--save-steps", "2", *SHARED],
    "rl": ["prompts.txt", "-o", "rl", "--pm", "pm", "--steps", "2", "--max-new-tokens", "8", *SHARED],
}


def prepare(folder: Path) -> None:
    tiny_model_dir(folder / "tiny")
    write_rows(folder / "rev.jsonl", [revision(i) for i in range(24)])
    write_rows(folder / "prefs.jsonl", [preference(i, 0.9, f"helpful {i}", f"toxic {i}") for i in range(24)])
    (folder / "prompts.txt").write_text("".join(f"question number {i}\n" for i in range(8)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=180.0)
    given = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cai_cli"]
    failed = 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for run in range(given.runs):
            stage = list(STAGES)[run % len(STAGES)]
            started = time.monotonic()
            with subprocess.Popen(
                [*launcher, stage, *STAGES[stage]], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
            ) as job:
                try:
                    _, output = job.communicate(timeout=given.seconds)
                    outcome = "done" if job.returncode == 0 else f"failed: {output[-2000:]}"
                except subprocess.TimeoutExpired:
                    job.terminate()
                    job.communicate()
                    outcome = "hung"
            failed += outcome != "done"
            print(f"{run + 1:>3} {stage:<9} {time.monotonic() - started:6.1f} s  {outcome}", flush=True)
    print(f"ratio two_processes_failed {failed / given.runs}")


if __name__ == "__main__":
    main()
