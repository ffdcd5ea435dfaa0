"""The processes in which `cai run` runs its steps. Each is `cai` with the command line of the step.

To import torch, transformers and TRL takes five to ten seconds, as long as a small step takes on a CPU. So on Linux
without a GPU the steps that load a model are forks of one process that has imported these libraries, and done nothing
else. On a machine with a GPU every step is a new process: CUDA does not work in the fork of a process that has
initialised it, as an import may.
"""

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
from cai_cli.common.child_process import die_with_parent, wait_for
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
NOT_TRANSFORMERS = ("openai:", "scripted:", "vllm:", "server:")  # prefixes of models that transformers does not load


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
        argv = [*step.argv, *(["--overwrite"] if overwrite else []), *(["--quiet"] if self.quiet else [])]
        console.say(f"[{step.name}] $ {shlex.join(['cai', *argv])}")
        code = self._run_as_fork(argv) if self.can_fork and _loads_a_model(step) else None
        if code is None:
            code = _run_in_new_process(argv)
        if code != 0:
            raise CaiError(
                f"step {step.name!r} ended with exit code {code}: {step.shell}",
                hint="fix the error above, then run the same `cai run` again: it resumes from here",
                code="step-failed",
            )

    def _run_as_fork(self, argv: Sequence[str]) -> int | None:
        """The exit code, or None where the libraries cannot be imported: `cai` itself says why."""
        if self._server and self._server.ended:
            self._server.close()
            self._server = None
        self._server = self._server or _ForkServer()
        code = self._server.run(argv)
        self.can_fork = code is not None
        return code


def _loads_a_model(step: Step) -> bool:
    fields = step.stage.config.option_names()
    names = [getattr(step.config, fields[option]) for option in MODELS if option in fields]
    return any(name is not None and not str(name).startswith(NOT_TRANSFORMERS) for name in names)


def _run_in_new_process(argv: Sequence[str]) -> int:
    command = [sys.executable, "-m", "cai_cli", *argv]
    return wait_for(subprocess.Popen(command, preexec_fn=die_with_parent))  # noqa: S603, PLW1509


class _ForkServer:
    """The process that steps are forked from (`cli.fork_server`).

    It receives command lines, and answers each with the process id of the fork, and with its exit code when it has
    ended.
    """

    def __init__(self) -> None:
        (request_read, request_write), (answer_read, answer_write) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "cai_cli.cli.fork_server", str(request_read), str(answer_write)],
            pass_fds=(request_read, answer_write),
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        os.close(request_read)
        os.close(answer_write)
        self._requests, self._answers = os.fdopen(request_write, "w", buffering=1), os.fdopen(answer_read)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, argv: Sequence[str]) -> int | None:
        """Run `cai` with these arguments.

        Returns:
            Its exit code, minus the number of the signal where one ended it; None where this process ended before the
            step began.
        """
        process_id = ""
        try:
            with suppress(BrokenPipeError):
                print(json.dumps(argv), file=self._requests)
            process_id = self._answers.readline()
            return int(self._answers.readline() or -signal.SIGKILL) if process_id else None
        except BaseException:
            if process_id:
                with suppress(ProcessLookupError):
                    os.kill(int(process_id), signal.SIGTERM)
            else:  # a fork that has just begun gets SIGTERM from the kernel
                self._process.kill()
            self.close()  # it ends after the step
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
        answers: The descriptor to which the process ids and exit codes of the forks are written, one a line.

    Returns:
        In each fork its command line; in the original, at the end, nothing.
    """
    with warnings.catch_warnings(action="ignore"):
        for name in LIBRARIES:
            with suppress(ImportError):
                import_module(name)
    server = os.getpid()
    with os.fdopen(requests) as lines, os.fdopen(answers, "w", buffering=1) as out:
        for line in lines:
            sys.stdout.flush()
            sys.stderr.flush()
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of idle threads of numpy
                fork = os.fork()
            if fork == 0:
                die_with_parent()
                if os.getppid() != server:
                    os._exit(128 + signal.SIGTERM)
                return json.loads(line)  # type: ignore[no-any-return]
            print(fork, file=out)
            _, status = os.waitpid(fork, 0)
            print(os.waitstatus_to_exitcode(status), file=out)
    return []
