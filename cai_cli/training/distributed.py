"""Data-parallel training in several processes, as `torchrun` and `accelerate launch` start them.

Only rank 0 writes files and prints; its decisions are broadcast (`from_rank_zero`). The first process that fails
reports the error, the others exit silently. Shutdown never blocks on a dead rank: a closed connection or TIMEOUT ends a
wait, and the process exits without the interpreter's cleanup.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # for collective operations; the other ranks wait while rank 0 checks or saves
SHUTDOWN_SECONDS = 60.0
RESUME = "run the same command again to resume from the last checkpoint"
_store: Any = None  # the rendezvous store, which also records the first process that failed


def rank() -> int:
    """The rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def launched() -> bool:
    """Whether a launcher started this process as part of a group, which may be a group of one."""
    return "RANK" in os.environ


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which writes files and prints."""
    return rank() == 0


def from_rank_zero(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank."""
    if world_size() == 1:
        return make()
    import torch
    import torch.distributed as dist

    result: list[Any] = [make() if is_rank_zero() else None]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    value: T = result[0]
    return value


def gathered(values: Sequence[T]) -> list[T]:
    """Return the `values` of all ranks, in the order of ranks, on every rank."""
    if world_size() == 1:
        return list(values)
    import torch.distributed as dist

    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def weights_are_sharded() -> bool:
    """Whether no process holds the whole model, as with FSDP and DeepSpeed ZeRO stage 3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


@contextmanager
def same_environment() -> Iterator[None]:
    """A context after which the variables that a launcher sets are as before. TRL sets them for vLLM in a process that
    no launcher started."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def session(trainers: frozenset[str]) -> Iterator[None]:
    """The context of a whole command: joins the process group, and on an error decides which process reports it.

    Does nothing in a process that no launcher started.

    Args:
        trainers: The commands that run in several processes.

    Raises:
        UsageError: `process-count`, when the command cannot run in several processes.
        CaiError: `lost-process`, when another process of the group has ended.
    """
    if not launched():
        _refuse_lost_processes()
        yield
        return
    if not is_rank_zero():
        console.mute()
        console.mute_errors(True)  # an error before all have joined is the same in all
    _join()
    console.mute_errors(False)
    try:
        if world_size() > 1:  # after all joined, or the launcher would kill the one that reports
            _refuse_other_commands(sys.argv[1:], trainers)
        yield
    except SystemExit as stop:
        if stop.code:
            _report_first()
        if stop.code == 143:
            console.error("stopped by the launcher, because another process ended or the launcher was stopped", RESUME)
        raise
    except RuntimeError as error:
        _report_first()
        if "gloo" not in str(error) and not _is_lost_connection(error):
            raise
        raise CaiError(
            "another process of this training ended or no longer answers",
            hint=f"its error is printed above, or it was killed; {RESUME}",
            code="lost-process",
        ) from error
    except BaseException:
        _report_first()
        raise


def leave(code: int) -> NoReturn:
    """Exit this process of a group without waiting for the others."""
    if code == 0:
        import torch.distributed as dist

        shutdown = threading.Thread(target=dist.destroy_process_group, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait for library threads that wait for dead processes


def _names_process_count(words: Sequence[str]) -> bool:
    """Whether the command line has --num-processes, which `launcher` checks."""
    return any(word.partition("=")[0] == "--num-processes" for word in words)


def _refuse_lost_processes() -> None:
    """Raises CaiError after `accelerate launch --cpu --num_processes 2`, which silently starts one process. It can be
    recognised by two environment variables."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and not _names_process_count(sys.argv):
        raise CaiError(
            "accelerate was started for several processes, but launched one",
            hint="use torchrun --nproc_per_node N -m cai_cli ..., or --num-processes 1 for one process",
            code="process-count",
        )


def _refuse_other_commands(words: Sequence[str], trainers: frozenset[str]) -> None:
    command = next((word for word in words if not word.startswith("-")), "")
    if command not in trainers:
        raise UsageError(
            f"cai {command} runs in one process, not in {world_size()}",
            hint="data stages take --shard I/N (see `cai merge`); sft, train-pm, rl and dpo train in several processes",
            code="process-count",
        )
    if "-" in words:
        raise UsageError(
            "stdin reaches one process only", hint="give a file that every process can read", code="option-conflict"
        )


def _join() -> None:
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _store, number, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=TIMEOUT)


def _report_first() -> None:
    """Mute the errors of this process unless it failed first. A process that reports ignores SIGTERM, so that the
    launcher cannot interrupt it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        first = _store.add("cai/failed", 1) == 1
    except RuntimeError:  # the store ended with rank 0, which may have reported nothing
        first = True
    console.mute_errors(not first)


def _is_lost_connection(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError)
