"""Measures rows a second and peak memory of the file handling alone: data stages with the scripted engine.

    python bench/spine.py [--rows 10000,100000,1000000] [--stage sample|critique-revise|label-prefs] [--zst]

The scripted engine answers at once. Each size runs in a separate `cai` process. Prints one line per size, the difference
in peak memory between the largest and the smallest, and `ratio spine VALUE`: rows a second at the largest size over
2,000.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

TARGET = 2_000  # rows a second
MEASURED = """
import atexit, resource, sys
from cai_cli.cli.app import main
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))
main()
"""
WORDS = {
    "sample": [],
    "critique-revise": ["--rounds", "1", "--few-shot", "none"],
    "label-prefs": ["--few-shot", "none", "--one-order"],
}
REPLY = (
    "It helps to start small and to say plainly what is known. Then ask which of the two costs more, and for whom. Most "
    "people find that a short list, kept by hand, does better than any plan. Where there is doubt, somebody who has done "
    "this before will see at once what a beginner misses. Nothing here needs to be decided today; sleep on it."
)
SCRIPT = {"replies": [REPLY], "scores": [-0.3, -1.5]}


def rows_for(stage: str, count: int) -> Iterator[dict[str, object]]:
    """`count` rows of some 600 to 1,000 bytes; those of label-prefs come in pairs of replies to one prompt."""
    for i in range(count):
        number = i // 2 if stage == "label-prefs" else i
        prompt = f"Question {number}: " + "how does one do this with care? " * 18
        if stage == "sample":
            yield {"id": f"prompt-{number}", "prompt": prompt}
            continue
        reply = f"Reply {i}. " + "It depends on what is meant by it. " * 10
        yield {
            "id": f"prompt-{number}", "prompt": [{"role": "user", "content": prompt}], "kind": "red-team",
            "source": "bench", "sample_index": i % 2 if stage == "label-prefs" else 0,
            "completion": [{"role": "assistant", "content": reply}], "finish_reason": "stop",
        }  # fmt: skip


def write_input(folder: Path, stage: str, count: int, ending: str) -> Path:
    path = folder / f"in-{count}{ending}"
    with path.open("wb") if ending == ".jsonl" else zstandard.open(path, "wb") as file:
        for row in rows_for(stage, count):
            file.write(json.dumps(row).encode() + b"\n")
    return path


def measure(folder: Path, stage: str, count: int, ending: str) -> tuple[float, float]:
    """(rows a second, peak MiB) of one run, including startup and shutdown."""
    source = write_input(folder, stage, count, ending)
    words = [
        stage,
        str(source),
        "-o",
        str(folder / f"out{ending}"),
        "--overwrite",
        "--model",
        f"scripted:{folder}/script.jsonl",
    ]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words, *WORDS[stage], "--json"], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    assert json.loads(done.stdout)["rejected"] == 0, "rejected rows are another work"
    source.unlink()
    return count / seconds, int(done.stderr.split()[-1]) / 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", default="10000,100000,1000000")
    arguments.add_argument("--stage", default="sample", choices=WORDS)
    arguments.add_argument("--zst", action="store_true", help="compressed input and output")
    options = arguments.parse_args()
    ending = ".jsonl.zst" if options.zst else ".jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.jsonl").write_text(json.dumps(SCRIPT) + "\n")
        results = {}
        for count in map(int, options.rows.split(",")):
            speed, peak = results[count] = measure(folder, options.stage, count, ending)
            print(
                f"{options.stage}{' .zst' if options.zst else ''}, {count:,} rows: {speed:,.0f} rows/s, peak {peak:.0f} MiB",
                flush=True,
            )
    smallest, largest = min(results), max(results)
    print(
        f"peak at {largest:,} rows is {results[largest][1] - results[smallest][1]:.0f} MiB above that at {smallest:,}"
    )
    print(f"ratio spine {results[largest][0] / TARGET:.2f}")


if __name__ == "__main__":
    main()
