"""The processes in which `cai run` runs its steps. Each is `cai` with the command line of the step.

To import torch, transformers and TRL takes five to ten seconds, as long as a small step takes on a CPU. So on Linux
without a GPU the steps that load a model are forks of one process that has imported these libraries, and nothing else.
On a machine with a GPU every step starts afresh: CUDA does not work in the fork of a process that has touched it, as
an import may.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.pipeline.plan import MODELS, Step

LIBRARIES = (
    "torch",
    "datasets",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "trl.trainer.sft_trainer",
)
GPU_DEVICES = ("nvidia*", "kfd", "dxg")  # in /dev: of NVIDIA, AMD, and Windows' subsystem for Linux
ELSEWHERE = ("openai:", "scripted:", "vllm:", "server:")  # in front of models that this process does not load


class StepProcesses:
    """Runs steps one after another. A context manager, which ends the process that they are forked from.

    Args:
        quiet: Whether steps print no progress.
        devices: The folder of device files.
    """

    def __init__(self, *, quiet: bool = False, devices: Path = Path("/dev")) -> None:
        self.quiet = quiet
        gpus = any(True for pattern in GPU_DEVICES for _ in devices.glob(pattern))
        self.can_fork = sys.platform == "linux" and not gpus
        self._server: _ForkServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._server:
            self._server.close()

    def run(self, step: Step, overwrite: bool) -> None:
        """Run a step in a process that ends with this one. Raises CaiError if it fails."""
        words = [*step.argv, *(["--overwrite"] if overwrite else []), *(["--quiet"] if self.quiet else [])]
        console.say(f"[{step.name}] $ {shlex.join(['cai', *words])}")
        if self.can_fork and _loads_a_model(step):
            if self._server is None or self._server.ended:
                self._server = _ForkServer()
            code = self._server.run(words)
        else:
            code = _run_afresh(words)
        if code != 0:
            raise CaiError(
                f"step {step.name!r} ended with exit code {code}: {step.shell}",
                hint="fix the error above, then run the same `cai run` again: it resumes from here",
                code="step-failed",
            )


def _loads_a_model(step: Step) -> bool:
    names = [value for name, value in step.settings.items() if name in MODELS and value is not None]
    return any(not str(name).startswith(ELSEWHERE) for name in names)


def _run_afresh(words: Sequence[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "cai_cli", *words], preexec_fn=die_with_parent)  # noqa: S603, PLW1509
    try:
        return child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise


class _ForkServer:
    """The process that steps are forked from.

    It receives command lines, and answers each with the number of the fork, and with its exit code when it has ended.
    """

    def __init__(self) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "cai_cli.pipeline.step_process", str(theirs_in), str(theirs_out)],
            pass_fds=(theirs_in, theirs_out),
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._requests, self._answers = os.fdopen(ours_out, "w", buffering=1), os.fdopen(ours_in)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, words: Sequence[str]) -> int:
        """Run `cai` with these words, and return its exit code: minus the signal's number where a signal ended it."""
        try:
            with suppress(BrokenPipeError):
                print(json.dumps(words), file=self._requests)
            fork = self._answers.readline()
        except BaseException:  # while it imports the libraries: the step must not start after that
            self._process.kill()
            raise
        if not fork:  # it could not import the libraries; `cai` itself says why
            return _run_afresh(words)
        try:
            return int(self._answers.readline() or -signal.SIGKILL)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(int(fork), signal.SIGTERM)
            self._answers.readline()
            raise

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._answers.close()


def fork_steps(requests: int, answers: int) -> list[str]:
    """In the process that steps are forked from: import the libraries, then fork for every command line.

    Args:
        requests: The descriptor from which command lines are read, one JSON list a line.
        answers: The descriptor to which the numbers and exit codes of the forks are written, one a line.

    Returns:
        In each fork its command line; in the original, at the end, nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt of a terminal is for the step
    with warnings.catch_warnings(action="ignore"):
        for name in LIBRARIES:
            with suppress(ImportError):
                import_module(name)
    with os.fdopen(requests) as lines, os.fdopen(answers, "w", buffering=1) as out:
        for line in lines:
            fork = os.fork()
            if fork == 0:
                die_with_parent()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return json.loads(line)  # type: ignore[no-any-return]
            print(fork, file=out)
            _, status = os.waitpid(fork, 0)
            print(os.waitstatus_to_exitcode(status), file=out)
    return []


def die_with_parent() -> None:
    """Terminate this process when its parent is killed (Linux only; elsewhere the lock still protects the output)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    from cai_cli.cli.app import main

    if words := fork_steps(int(sys.argv[1]), int(sys.argv[2])):
        sys.argv = ["cai", *words]
        main()
