"""Threads wait for each other without holding a core, and their number follows a quota but not the load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cai_cli.common import threads

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OPENBLAS_THREAD_TIMEOUT", "OMP_NUM_THREADS")
CLEAN = {name: value for name, value in os.environ.items() if name not in VARIABLES}


def openmp_settings(**more: str) -> str:
    """What OpenMP prints when torch loads it in a command."""
    command = [sys.executable, "-m", "cai_cli", "doctor"]
    shown = CLEAN | {"OMP_DISPLAY_ENV": "verbose"} | more
    return subprocess.run(command, env=shown, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="libomp prints its settings in another form")
def test_a_command_sets_how_threads_wait_before_torch_is_loaded() -> None:
    assert "GOMP_SPINCOUNT = '1000'" in openmp_settings()
    chosen = openmp_settings(OMP_WAIT_POLICY="active")
    assert "GOMP_SPINCOUNT = '1000'" not in chosen
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in chosen


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_the_waiting_policy_of_the_user_is_kept(name: str) -> None:
    environment = {name: "7", "OPENBLAS_THREAD_TIMEOUT": "20", "OMP_NUM_THREADS": "3"}
    threads.configure(environment)
    assert environment == {name: "7", "OPENBLAS_THREAD_TIMEOUT": "20", "OMP_NUM_THREADS": "3"}


def control_groups(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(lines)
    return folder / "cgroup", folder / "mounted"


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # a container
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),  # a batch job
        ("3:cpu,cpuacct:/a:b\n0::/\n", {"cpu/a:b/cpu.cfs_quota_us": "300000", "cpu/a:b/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n", {"cpu.max": "100000 100000\n"}, None),
    ],
)  # fmt: skip
def test_a_quota_of_a_control_group_is_counted_in_whole_cores(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int | None
) -> None:
    assert threads.quota_cores(*control_groups(tmp_path, lines, files)) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert threads.quota_cores(tmp_path / "none", tmp_path) is None


def test_a_quota_below_the_cores_sets_the_number_of_threads_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: frozenset(range(8)))
    environment: dict[str, str] = {}
    for quota, expected in ((None, None), (8, None), (3, "3")):
        monkeypatch.setattr(threads, "quota_cores", lambda quota=quota: quota)
        threads.configure(environment := {})
        assert environment.get("OMP_NUM_THREADS") == expected
    threads.configure(environment)  # a step of `cai run` inherits the number ...
    threads.leave_count_to_launcher(environment)  # ... and starts a launcher, which chooses for each process
    assert "OMP_NUM_THREADS" not in environment
    threads.leave_count_to_launcher(given := {"OMP_NUM_THREADS": "3"})
    assert given == {"OMP_NUM_THREADS": "3"}


def test_the_load_is_the_share_of_time_in_which_a_core_was_not_idle() -> None:
    before = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 0 100 0 0 0 0 0 0\ncpu1 50 0 0 50 0 0 0 0 0 0\n"
    after = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 120 0 0 100 0 0 0 0 0 0\ncpu1 55 0 0 55 10 0 0 0 0 0\n"
    assert threads.busy_cores(before, after, {0}) == 1.0
    assert threads.busy_cores(before, after, {0, 1}) == pytest.approx(1.25)
    assert threads.busy_cores(before, before, {0, 1, 2}) == 0.0
