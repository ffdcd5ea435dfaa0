"""How the threads of the numeric libraries share this machine with other processes.

torch computes with a team of OpenMP threads, one per core. By default a thread that waits for the others spins for
some milliseconds, which takes the core from the very thread that it waits for when another process runs there: beside
other jobs a stage then takes many times as long. Here threads spin briefly and then sleep.

The load of the machine does not decide the number of threads: sums are rounded in an order that depends on it, so that
a run on a busy machine would differ from one on a quiet machine. `configure` must be called before torch or numpy is
imported, because the libraries read the environment when they are loaded.
"""

import os
from collections.abc import Collection, Iterable, MutableMapping
from pathlib import Path

# GOMP_SPINCOUNT is for libgomp (Linux): 1,000 is its own value where it knows of more threads than cores, 300,000 its
# default. KMP_BLOCKTIME (milliseconds) is for libomp (macOS, conda), whose default is 200. OMP_WAIT_POLICY=passive
# would set both to zero, which costs more on a quiet machine.
SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
_BLAS_TIMEOUT = "OPENBLAS_THREAD_TIMEOUT"  # of numpy's and scipy's thread pools: they spin for 2 ** VALUE cycles
_COUNT, _COUNT_IS_OURS = "OMP_NUM_THREADS", "CAI_CHOSE_OMP_NUM_THREADS"


def configure(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how long threads spin and, under a quota of CPU time, how many there are. Values of the user are kept.

    Args:
        environment: The environment variables of this process, which its children inherit.
    """
    if not {"OMP_WAIT_POLICY", *SPINNING} & environment.keys():
        environment.update(SPINNING)
    environment.setdefault(_BLAS_TIMEOUT, "10")
    quota = quota_cores()
    if _COUNT not in environment and quota is not None and quota < len(cores()):
        environment.update({_COUNT: str(quota), _COUNT_IS_OURS: "1"})


def leave_count_to_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take back a number of threads that `configure` chose: it was meant for one process, and a launcher starts several
    on the same cores."""
    if environment.pop(_COUNT_IS_OURS, None):
        environment.pop(_COUNT, None)


def cores() -> frozenset[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def quota_cores(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The whole cores that the CPU quota of this process amounts to, at least one; None where there is no quota.

    OpenMP does not know of quotas, which containers and batch systems set: with more threads than the quota allows, all
    of them are stopped for a part of every period.

    Args:
        groups: The file that names the control groups of this process.
        mounted: Where control groups are mounted.
    """
    shares: list[float] = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / ("cpu" if controllers else "")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # a container sees its own group as the root
            shares += _quota(root / folder)
    return max(1, int(min(shares))) if shares else None


def _quota(group: Path) -> Iterable[float]:
    """The cores' worth of CPU time that one control group allows; nothing where it sets no limit."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return []
    return [int(limit) / int(period)] if limit not in ("max", "-1") else []


def busy_cores(before: str, after: str, numbers: Collection[int]) -> float:
    """How many of the cores `numbers` were busy on average between two readings of `/proc/stat`."""
    busy = 0.0
    for number in numbers:
        first, last = _ticks(before, number), _ticks(after, number)
        passed = [b - a for a, b in zip(first, last, strict=True)]
        idle = sum(passed[3:5])  # idle, and waiting for a disk
        busy += 1 - idle / sum(passed) if sum(passed) else 0.0
    return busy


def _ticks(stat: str, number: int) -> list[int]:
    line = next((line for line in stat.splitlines() if line.startswith(f"cpu{number} ")), f"cpu{number}")
    return [int(word) for word in line.split()[1:9]]  # the last two are counted in the first two already
