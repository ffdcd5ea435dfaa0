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
from conftest import Cai
from helpers import rows_in, write_rows
from loopback import Loopback, Request, good
from pipeline_cases import planned

from cai_cli.common.errors import CaiError
from cai_cli.pipeline import ray_executor
from cai_cli.pipeline.ray_executor import RayExecutor, RayOptions

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
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes with one CPU each."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # on a busy machine
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
            assert gate.waiting.acquire(timeout=120)
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


def test_an_option_of_ray_needs_the_executor(cai: Cai, folder: Path) -> None:
    for words in (("--shards", "2"), ("--address", "h:1"), ("--task-cpus", "1"), ("--task-gpus", "0")):
        assert cai("run", "pipeline.yaml", *words).error == "option-conflict"


@pytest.mark.parametrize(
    ("nodes", "processes", "expected"),
    [
        ([{"CPU": 8, "GPU": 8}], 8, (8, 1)),
        ([{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}], 8, (8, 1)),
        ([{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}], 16, (8, 2)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 4}, {"CPU": 64}], 4, (4, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 4}], 6, None),
    ],
)
def test_a_group_of_processes_takes_as_few_nodes_as_hold_it(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    processes: int,
    expected: tuple[int, int] | None,
) -> None:
    monkeypatch.setattr(ray_executor, "nodes", lambda: nodes)
    (step,) = planned(folder, "  tuned: {command: sft, input: prompts.jsonl, model: m}\n")
    executor = RayExecutor(RayOptions(), folder)
    if expected:
        assert executor._nodes_for(step, processes) == expected
    else:
        with pytest.raises(CaiError) as error:
            executor._nodes_for(step, processes)
        assert error.value.code == "no-device"


@pytest.mark.parametrize(("model", "gpus"), [("openai:m", 0), ("scripted:script.jsonl", 0), ("m", 1)])
def test_a_task_takes_a_gpu_where_its_step_runs_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, gpus: int
) -> None:
    (step,) = planned(folder, f'  s: {{command: sample, input: prompts.jsonl, model: "{model}"}}\n')
    for resources, expected in (({"CPU": 4, "GPU": 2}, gpus), ({"CPU": 4}, 0)):
        monkeypatch.setattr(ray_executor, "nodes", lambda resources=resources: [resources])
        executor = RayExecutor(RayOptions(), folder)
        assert executor._gpus(step) == expected
        assert executor._places(step) == (2 if expected else 4)


def test_a_resumed_run_keeps_the_number_of_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "nodes", lambda: [{"CPU": 3}])
    (step,) = planned(folder, "  s: {command: sample, input: prompts.jsonl, model: scripted:script.jsonl}\n")
    first = RayExecutor(RayOptions(), folder)._shard_folder(step)
    assert first[1] == 3
    monkeypatch.setattr(ray_executor, "nodes", lambda: [{"CPU": 8}])
    assert RayExecutor(RayOptions(), folder)._shard_folder(step) == first
    assert RayExecutor(RayOptions(shards=2), folder)._shard_folder(step)[1] == 2


def test_sigterm_keeps_its_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = planned(folder, "  s: {command: sample, input: prompts.jsonl, model: scripted:script.jsonl}\n")

    def interrupted(*_: object) -> None:  # what `ray.wait` makes of it
        raise SystemExit(1)

    monkeypatch.setattr(RayExecutor, "_run_shards", interrupted)
    with pytest.raises(SystemExit) as stop:
        RayExecutor(RayOptions(), folder).run(step, overwrite=False)
    assert stop.value.code == 143
