"""The Ray cluster that `cai run --executor ray` connects to, and the room on its nodes."""

import math
import signal
import socket
from collections.abc import Mapping

from cai_cli.common.errors import CaiError, UsageError


def connect(address: str | None) -> None:
    """Connect to an existing cluster.

    Raises:
        UsageError: `invalid-option`, for an address that is not HOST:PORT.
        CaiError: `missing-dependency` or `server-unreachable`.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise CaiError(
            "--executor ray needs Ray, which is not installed",
            hint="pip install '.[ray]', in the version of the cluster",
            code="missing-dependency",
        ) from None
    if address:
        _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from None
    finally:
        for number, handler in handlers.items():  # Ray replaces them
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raises as `connect`, at once; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and "/" not in host):
        raise UsageError(f"--address must be HOST:PORT, not {address!r}", code="invalid-option")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> CaiError:
    return CaiError(
        f"no Ray cluster{f' at {address}' if address else ''}: {' '.join(str(error).split())[:200]}",
        hint="run this on a node of the cluster; `ray start --head` starts one, and prints its address",
        code="server-unreachable",
    )


def nodes() -> list[Mapping[str, float]]:
    """The resources of each living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def capacity(node: Mapping[str, float], cpus: int, gpus: int) -> int:
    """How many tasks a node holds at once."""
    room = [node.get("CPU", 0) / cpus] + ([node.get("GPU", 0) / gpus] if gpus else [])
    return math.floor(min(room))
