"""Training in several processes, as `torchrun` and `accelerate launch` start them: one model, the rows dealt out.

Rank 0 alone writes files and speaks; what it decides the others are told (`from_leader`), and wait for. The first
process that fails says why, the others end without a word, and no end waits for a process that is gone: a closed
connection, or TIMEOUT, ends a wait, and the interpreter is left at once.
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
TIMEOUT = timedelta(hours=2)  # the longest wait for another process: while rank 0 checks or saves, the others wait
GOODBYE_SECONDS = 60.0
RESUME = "run the same again to go on from the last checkpoint"
_store: Any = None  # where the processes find each other; also holds which of them failed first


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def launched() -> bool:
    """Whether a launcher started this process as one of a group (which may be a group of one)."""
    return "RANK" in os.environ


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def from_leader(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank. Only rank 0 calls it; the others wait."""
    if world_size() == 1:
        return make()
    import torch
    import torch.distributed as dist

    held: list[Any] = [make() if leads() else None]
    dist.broadcast_object_list(held, device=torch.device("cpu"))
    made: T = held[0]
    return made


def gathered(values: Sequence[T]) -> list[T]:
    """The `values` of all ranks, on every rank, in the order of ranks."""
    if world_size() == 1:
        return list(values)
    import torch.distributed as dist

    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def weights_are_sharded() -> bool:
    """Whether no process holds the whole model: FSDP, or DeepSpeed at ZeRO stage 3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


@contextmanager
def session(trainers: frozenset[str]) -> Iterator[None]:
    """Around a whole command: join the group, and on the way out decide who says what went wrong. Does nothing in a
    process that no launcher started. Raises UsageError, CaiError."""
    if not launched():
        _refuse_lost_processes()
        yield
        return
    if not leads():
        console.mute()
        console.mute_errors(True)  # until all have met, what is wrong is wrong for all
    _join()
    console.mute_errors(False)
    try:
        if world_size() > 1:  # after all have met: one that ends sooner has the launcher end the one that would speak
            _refuse_other_commands(sys.argv[1:], trainers)
        yield
    except SystemExit as stop:
        if stop.code:
            _speak_first()
        if stop.code == 143:
            console.error("stopped by the launcher: another process ended, or it was told to", RESUME)
        raise
    except RuntimeError as error:
        _speak_first()
        if "gloo" not in str(error) and not _is_lost_connection(error):
            raise
        raise CaiError(
            "another process of this training ended or no longer answers",
            hint=f"what it said stands above, or it was killed; {RESUME}",
        ) from error
    except BaseException:
        _speak_first()
        raise


def leave(code: int) -> NoReturn:
    """End this process of a group, whatever the others do."""
    if code == 0:
        import torch.distributed as dist

        goodbye = threading.Thread(target=dist.destroy_process_group, daemon=True)
        goodbye.start()
        goodbye.join(GOODBYE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end would wait for threads of the libraries that wait for lost processes


def _counted(words: Sequence[str]) -> bool:
    """Whether the command line says how many processes there are, which `launch` checks."""
    return any(word.partition("=")[0] == "--num-processes" for word in words)


def _refuse_lost_processes() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing; it does set these two."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and not _counted(sys.argv):
        raise CaiError(
            "accelerate was asked for several processes and has started one",
            hint="torchrun --nproc_per_node N -m cai_cli ...; where one is meant, --num-processes 1",
        )


def _refuse_other_commands(words: Sequence[str], trainers: frozenset[str]) -> None:
    command = next((word for word in words if not word.startswith("-")), "")
    if command not in trainers:
        raise UsageError(
            f"cai {command} runs in one process, not in {world_size()}",
            hint="data stages take --shard I/N (see `cai merge`); sft, train-pm and rl train in several processes",
        )
    if "-" in words:
        raise UsageError("stdin reaches one process only", hint="give a file that every process can read")


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


def _speak_first() -> None:
    """Leave the word to the process that failed first, which no signal of the launcher may now cut off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        first = _store.add("cai/failed", 1) == 1
    except RuntimeError:  # the store went with rank 0, which may have said nothing
        first = True
    console.mute_errors(not first)


def _is_lost_connection(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError)
