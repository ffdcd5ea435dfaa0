"""`cai run --executor ray`: the steps of a run on a Ray cluster of two nodes on this machine."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import rows_in, write_rows
from loopback import Loopback, Request, good

RUN = """\
name: r
model: openai:m
seed: 3
steps:
  samples: {{command: sample, input: prompts.jsonl, n: 2, base-url: "{url}", concurrency: 1}}
"""
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
HEAD = NODE | {"include_dashboard": False, "_system_config": QUICK}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two nodes with one CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    two = cluster_utils.Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        two.second = two.add_node(**NODE)
        yield two
    finally:
        two.shutdown()


class Gate:
    """Answers as `good`; the first two requests wait until one of their senders is gone."""

    def __init__(self) -> None:
        self.waiting, self.gone = threading.Semaphore(0), threading.Event()

    def __call__(self, request: Request) -> bytes:
        if request.number <= 2:
            self.waiting.release()
            request.connection.settimeout(0.2)
            while not self.gone.is_set():
                with suppress(TimeoutError):
                    if not request.connection.recv(1):
                        self.gone.set()
        return good(request)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


@pytest.mark.slow
def test_a_run_whose_node_is_killed_has_the_bytes_of_one_process(cluster: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(8)))

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cai_cli", "run", "run.yaml", *words]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))

    gate = Gate()
    with Loopback(gate) as server:
        (tmp_path / "run.yaml").write_text(RUN.format(url=server.url))
        run = start("--out", "on-ray", "--executor", "ray", "--address", cluster.address, "--shards", "2")
        for _ in range(2):  # each node has a shard whose first request waits
            assert gate.waiting.acquire(timeout=60)
        cluster.remove_node(cluster.second, allow_graceful=False)
        _, messages = run.communicate(timeout=120)
        assert run.returncode == 0, messages
        on_ray = len(server.requests)
        alone = start("--out", "alone")
        _, messages = alone.communicate(timeout=60)
        assert alone.returncode == 0, messages
        assert on_ray > len(server.requests) - on_ray, "no request was sent twice: the killed shard did not run again"
    assert contents(tmp_path / "on-ray") == contents(tmp_path / "alone")
    assert len(rows_in(tmp_path / "on-ray/samples.jsonl")) == 16
    assert not (tmp_path / "on-ray/shards").exists()
