"""`--accelerate-config` and `--num-processes` of the training stages: start the command again through accelerate, and
check the number of processes."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from cai_cli.common import threads
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.yaml import load_yaml
from cai_cli.training import distributed, sharding


def launch(accelerate_config: str | None, num_processes: int | None) -> None:
    """Replace this process by `accelerate launch` of the same command, or check the processes that are running.

    Args:
        accelerate_config: The `--accelerate-config` option. With it the function does not return.
        num_processes: The `--num-processes` option; None accepts any number.

    Raises:
        UsageError: `option-conflict` or `invalid-option`.
        CaiError: `process-count`, when another number of processes is running.
    """
    if accelerate_config and distributed.launched():
        raise UsageError(
            "--accelerate-config cannot be used under a launcher, which has started the processes already",
            hint="leave it out",
            code="option-conflict",
        )
    if accelerate_config:
        _launch(accelerate_config, num_processes)
    sharding.refuse_unsupported()
    if num_processes not in (None, distributed.world_size()):
        raise CaiError(
            f"--num-processes is {num_processes}, but the number of running processes is {distributed.world_size()}",
            hint="on CPU accelerate always starts one: torchrun --nproc_per_node N -m cai_cli ...",
            code="process-count",
        )


@dataclass(frozen=True)
class Node:
    """One of the nodes that the processes of a training step run on.

    Attributes:
        rank: Its number, from 0.
        count: The number of nodes.
        address: Address of node 0.
        port: A free port of node 0.
    """

    rank: int
    count: int
    address: str
    port: int


def group_size(accelerate_config: str | None, num_processes: int | None) -> int:
    """The number of processes that the two options request. Raises UsageError."""
    given = read_config(accelerate_config) if accelerate_config else {}
    return num_processes or int(given.get("num_processes", 1))


def group_command(words: Sequence[str], config: str | None, processes: int, node: Node) -> list[str]:
    """The command after the Python interpreter that starts the processes of one node.

    Args:
        words: The command line after `cai`.
        config: Its `--accelerate-config`; None starts them by torchrun.
        processes: Processes on all nodes together.
        node: The node.
    """
    own = [*without(words, ("--accelerate-config", "--num-processes")), "--num-processes", str(processes)]
    where: dict[str, str | int]
    if config:
        where = {"num_machines": node.count, "machine_rank": node.rank}
        where |= {"main_process_ip": node.address, "main_process_port": node.port}
        start = [*_accelerate(config_path(config), processes), *_flags(where), "--module"]
    else:
        where = {"nnodes": node.count, "node_rank": node.rank, "nproc_per_node": processes // node.count}
        where |= {"master_addr": node.address, "master_port": node.port}
        start = ["-m", "torch.distributed.run", *_flags(where), "-m"]
    return [*start, "cai_cli", *own]


def _flags(options: Mapping[str, str | int]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _accelerate(path: Path, processes: int) -> list[str]:
    # --dtype sets the precision; that of a config would differ from the manifest.
    words = ["--config_file", str(path), "--num_processes", str(processes), "--mixed_precision", "no"]
    return ["-m", "accelerate.commands.launch", *words]


def _launch(config: str, num_processes: int | None) -> NoReturn:
    """Replace this process by `accelerate launch` of the same command line."""
    if read_config(config).get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise CaiError(
            f"--accelerate-config {config} needs DeepSpeed, which is not installed",
            hint="pip install deepspeed",
            code="missing-dependency",
        )
    count = group_size(config, num_processes)
    own = [*without(sys.argv[1:], ("--accelerate-config", "--num-processes")), "--num-processes", str(count)]
    sys.stderr.flush()
    threads.leave_count_to_launcher()
    command = [sys.executable, *_accelerate(config_path(config), count), "--module", "cai_cli", *own]
    os.execv(sys.executable, command)  # noqa: S606 - no shell  # nosec B606


def read_config(config: str) -> dict[str, Any]:
    """The fields of an accelerate config, given as for `config_path`. Raises UsageError."""
    path = config_path(config)
    given: Any = load_yaml(path)
    if not isinstance(given, dict):
        raise UsageError(f"{path}: not a config of accelerate", code="invalid-option")
    return given


def config_path(config: str) -> Path:
    """The path of an accelerate config, given as a file or as the name of one that TRL ships. Raises UsageError."""
    if Path(config).is_file():
        return Path(config)
    spec = find_spec("trl")
    shipped = Path(str(spec.origin)).parent / "accelerate_configs" if spec else Path()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if config not in names:
        raise UsageError(
            f"--accelerate-config {config}: neither a file nor a known name",
            hint=f"known: {', '.join(names)}",
            code="invalid-option",
        )
    return shipped / f"{config}.yaml"


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without these options, written as `--option VALUE` or `--option=VALUE`."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in options:
            next(rest, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept
