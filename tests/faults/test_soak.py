"""A long run against a server of which one answer in a hundred fails: every row comes out or is counted, and file
descriptors, threads and memory stay what they were. `make soak` runs it for half an hour."""

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Ran
from helpers import manifest_of
from loopback import Loopback, Request, cut, error, good, reset

SECONDS = float(os.environ.get("CAI_SOAK_SECONDS", "40"))
REFUSED_EVERY = 97  # prompts the server will not have, each asked once and rejected


@pytest.mark.faults
@pytest.mark.timeout(SECONDS + 300)
def test_one_failure_in_a_hundred_answers_costs_no_row_and_nothing_piles_up(tmp_path: Path, ran: Ran) -> None:
    dice, lock = random.Random(1), threading.Lock()
    failed = 0

    def behave(request: Request) -> bytes | None:
        nonlocal failed
        server.requests.clear()  # half an hour of them would fill this process
        if request.asked.startswith("refuse"):
            return error(400, "no")
        with lock:
            thrown = dice.random()
            failed += thrown < 0.01
        if thrown < 0.01:
            faults = (reset, cut, lambda _: error(500), lambda _: error(429, Retry_After="1"))
            return faults[int(thrown * 400)](request)
        return good(request)

    with Loopback(behave) as server:
        words = (
            "sample",
            "-",
            "-o",
            "out.jsonl",
            "--model",
            "openai:m",
            "--base-url",
            server.url,
            "--concurrency",
            "8",
        )
        with (tmp_path / "stderr").open("w") as stderr_file:
            child = subprocess.Popen(
                [sys.executable, "-m", "cai_cli", *words], cwd=tmp_path, stdin=subprocess.PIPE, stderr=stderr_file
            )
        seen: list[tuple[int, int, int]] = []
        asked, refused, deadline = 0, 0, time.monotonic() + SECONDS
        watching = threading.Thread(target=monitor_scorer, args=(child, seen), daemon=True)
        watching.start()
        assert child.stdin
        while time.monotonic() < deadline:
            for _ in range(50):
                what = "refuse" if asked % REFUSED_EVERY == 0 else "question"
                refused += what == "refuse"
                child.stdin.write(json.dumps({"id": f"p{asked}", "prompt": f"{what} {asked}"}).encode() + b"\n")
                asked += 1
            child.stdin.flush()
        child.stdin.close()
        code, stderr = child.wait(120), (tmp_path / "stderr").read_text()
        assert code == 0, stderr
        watching.join(10)
    counts = manifest_of(tmp_path / "out.jsonl")["counts"]
    assert (counts["in"], counts["out"], counts["rejected"]) == (asked, asked - refused, refused)
    assert counts["rejected_reasons"] == {"refused by the server, HTTP 400": refused}
    with (tmp_path / "out.jsonl").open() as rows:
        ids = [int(json.loads(row)["id"][1:]) for row in rows]
    assert ids == [i for i in range(asked) if i % REFUSED_EVERY]
    assert failed > 0
    assert "Traceback" not in stderr
    quarter = len(seen) // 4
    out_of_order, late = seen[quarter : 2 * quarter], seen[-quarter:]
    for what, place, slack in (("file descriptors", 0, 6), ("threads", 1, 1), ("MiB", 2, 24)):
        before, after = (statistics.median(sample[place] for sample in part) for part in (out_of_order, late))
        assert after <= before + slack, f"{what}: {before} -> {after}"
    ran(
        f"{asked:,} rows in {SECONDS:.0f} s, {failed} failures; descriptors, threads, MiB: {out_of_order[0]} -> {late[-1]}"
    )


def monitor_scorer(child: subprocess.Popen[bytes], seen: list[tuple[int, int, int]]) -> None:
    """(open files, threads, resident MiB) of the process, a few times a second."""
    here = Path(f"/proc/{child.pid}")
    while child.poll() is None:
        try:
            resident = int((here / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
            seen.append((len(os.listdir(here / "fd")), len(os.listdir(here / "task")), resident))
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.2)
