"""Measures each stage on a quiet machine and beside a busy loop of another process.

    python bench/busy.py [--model smollm2-135m] [--stages sample rl ...] [--repeats 1] [--loops 1]

Each stage is a whole `cai` command in an environment like the caller's. A pass runs every stage quiet and then beside
`--loops` Python processes that never sleep, each in a session of its own like a job of another user. Prints the seconds
of each pair, the median of each stage and `ratio busy VALUE`: the largest ratio of medians. Exits with 1 if it is above
2.2. Nothing else may run on the machine; with the defaults it takes some four minutes on two cores.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
BOUND = 2.2
WRITTEN = ["--max-new-tokens", "32", "--temperature", "0.7"]
TRAINED = ["--learning-rate", "1e-5", "--max-steps", "2"]
# In the order of the pipeline: a stage reads what the quiet run of an earlier one wrote.
STAGES: dict[str, tuple[list[str], list[str]]] = {  # name: (inputs and models, other options)
    "sample": (["red_team.jsonl"], ["--limit", "12", "--n", "2", *WRITTEN]),
    "critique": (["sample"], WRITTEN),
    "revise": (["critique"], WRITTEN),
    "critique-revise": (["sample"], ["--rounds", "1", "--limit", "12", *WRITTEN]),
    "red-team": (["red_team.jsonl"], ["--n", "12", "--max-new-tokens", "32"]),
    "sft": (["revise"], TRAINED),
    "label-prefs": (["sample"], []),
    "train-pm": (["label-prefs"], TRAINED),
    "score": (["sample", "--pm", "train-pm"], []),
    "rl": (
        ["red_team.jsonl", "--pm", "train-pm"],
        ["--limit", "8", "--steps", "2", "--prompts-per-step", "2", "--max-new-tokens", "32"],
    ),
}


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that keep a core busy each, as long as the context lasts."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def command_line(stage: str, model: str, output: str) -> list[str]:
    """The words of one stage after `cai`."""
    given, more = STAGES[stage]
    words = [str(ROOT / "examples" / word) if word.endswith(".jsonl") else word for word in given]
    command = [stage, *words, "-o", output, "--overwrite", "--quiet", *more]
    return command if stage == "score" else [*command, "--model", model]


def seconds(folder: Path, stage: str, model: str, output: str) -> float:
    """The wall time of one stage, startup included."""
    command = [sys.executable, "-m", "cai_cli", *command_line(stage, model, output)]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{stage} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    arguments.add_argument("--repeats", type=int, default=1)
    arguments.add_argument("--loops", type=int, default=1)
    options = arguments.parse_args()
    needed = set(options.stages)
    for stage in reversed(STAGES):
        if stage in needed:
            needed |= STAGES.keys() & set(STAGES[stage][0])
    pairs: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES if stage in needed}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(options.repeats):
            for stage, times in pairs.items():
                if stage not in options.stages and times:
                    continue
                quiet = seconds(folder, stage, options.model, stage)
                if stage not in options.stages:  # it only makes an input
                    times.append((quiet, quiet))
                    continue
                with busy(options.loops):
                    beside = seconds(folder, stage, options.model, f"{stage}.busy")
                times.append((quiet, beside))
                print(f"{stage:<16} quiet {quiet:6.1f} s, busy {beside:6.1f} s: {beside / quiet:.2f}", flush=True)
    ratios = {}
    for stage in options.stages:
        quiet, beside = (median(times) for times in zip(*pairs[stage], strict=True))
        ratios[stage] = beside / quiet
        print(f"median {stage:<16} quiet {quiet:6.1f} s, busy {beside:6.1f} s: {ratios[stage]:.2f}")
    print(f"ratio busy {max(ratios.values()):.2f}")
    sys.exit(max(ratios.values()) > BOUND)


if __name__ == "__main__":
    main()
