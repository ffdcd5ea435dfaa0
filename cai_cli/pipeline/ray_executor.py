"""`cai run --executor ray`: the steps of a run as tasks on an existing Ray cluster.

A data stage runs as shards, one task each, which are merged as `cai merge` does; the result is that of one process. A
task of a node that dies runs again on another node and resumes from the rows that are written. A training stage runs
on one node, or in several processes on as many nodes as they need (`training.launcher`), and resumes from its last
checkpoint. All nodes share the file system of the run folder and have `cai` installed. Only commands and paths go
through Ray; rows and models do not.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cai_cli.common import console
from cai_cli.common.child_process import die_with_parent, wait_for
from cai_cli.common.errors import CaiError
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.ray_cluster import capacity, connect, nodes
from cai_cli.runtime.merge import Part, merge_shards
from cai_cli.runtime.output_files import wait_for_writer
from cai_cli.training.launcher import Node, group_command, group_size

ATTEMPTS = 6  # of a task, where its node or its process is killed
LOCK_SECONDS = 120.0  # for which a task waits for the process of the attempt before it
PASSED_ON = ("PYTHONPATH", "PYTHONSAFEPATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OPENAI_BASE_URL")
FOLDER = "shards"  # in the run folder


class TaskKilledError(Exception):
    """A signal ended the command of a task, as when its node is taken away."""


@dataclass(frozen=True)
class RayOptions:
    """The options of the executor.

    Attributes:
        address: Of the cluster, as HOST:PORT; None finds the one on this machine.
        shards: Shards of a data stage; None takes as many as run at once.
        cpus: CPUs of a task.
        gpus: GPUs of a task; None takes one where the cluster has GPUs and the step runs a model on them.
    """

    address: str | None = None
    shards: int | None = None
    cpus: int = 1
    gpus: int | None = None


@dataclass(frozen=True)
class Command:
    """A command line that a task runs.

    Attributes:
        words: After the Python interpreter.
        folder: The working folder.
        environment: Variables that it needs besides those of the node.
        log: Receives what it prints.
        output: Its output, whose earlier writer it waits for; None where it has none.
    """

    words: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    log: str
    output: str | None


def run_command(command: Command) -> tuple[int, str]:
    """Run a command on this node. It ends with this process.

    Returns:
        Its exit code, and the name of the node.

    Raises:
        TaskKilledError: A signal ended it; Ray runs the task again.
    """
    os.chdir(command.folder)
    if command.output:
        wait_for_writer(Path(command.output), LOCK_SECONDS)
    with Path(command.log).open("ab") as log:
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, *command.words],
            env={**os.environ, **command.environment},
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        code = wait_for(child)
    if code in (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM):
        raise TaskKilledError
    return code, socket.gethostname()


def address_and_port() -> tuple[str, int]:
    """The address of this node, and a free port of it, for the first process of a group."""
    import ray.util

    with socket.socket() as any_port:
        any_port.bind(("", 0))
        return ray.util.get_node_ip_address(), int(any_port.getsockname()[1])


class RayExecutor:
    """Runs steps on a cluster. A context manager, which disconnects at the end.

    Args:
        options: The options.
        out: The run folder, which all nodes see under this path.
    """

    def __init__(self, options: RayOptions, out: Path) -> None:
        self.options, self.out = options, out

    def __enter__(self) -> Self:
        connect(self.options.address)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        import ray

        ray.shutdown()

    def run(self, step: Step, overwrite: bool) -> None:
        """Run a step. Raises CaiError `step-failed`, or `no-device` where no node has what it needs."""
        console.say(f"[{step.name}] $ {step.shell}")
        try:
            self._run(step, overwrite)
        except SystemExit:  # from the handler of SIGTERM; on its way through Ray it loses its code
            raise SystemExit(143) from None

    def _run(self, step: Step, overwrite: bool) -> None:
        more = ["--overwrite"] if overwrite else []
        if step.stage.trains:
            self._train(step, more)
        elif not is_sharded(step) or (step.output.exists() and not overwrite):  # finished, or a file that grows
            self._run_tasks(step, [self._command([*step.argv, *more], step.output, self._log(step))])
        else:
            self._run_shards(step, overwrite)

    # --- data stages --------------------------------------------------------------------------------------------

    def _run_shards(self, step: Step, overwrite: bool) -> None:
        folder, count = self._shard_folder(step)
        names = [f"{index}/{count}" for index in range(1, count + 1)]
        outputs = [folder / f"{name.replace('/', '-of-')}.jsonl" for name in names]
        commands = [
            self._command([*step.command_line(output), "--shard", name], output, output.with_suffix(".log"))
            for name, output in zip(names, outputs, strict=True)
        ]
        console.say(f"[{step.name}] {count} shards on Ray; their messages: {folder}/*.log")
        self._run_tasks(step, commands)
        merge_shards(outputs, step.output, overwrite=overwrite, as_json=False)
        shutil.rmtree(folder)
        with suppress(OSError):  # the folder of another step is in it
            folder.parent.rmdir()

    def _shard_folder(self, step: Step) -> tuple[Path, int]:
        """The folder of a step's shards and their number, which a resumed run keeps."""
        name = f"{step.name}-{step.key.rpartition(':')[2][:12]}"
        for folder in sorted((self.out / FOLDER).glob(f"{name}-in-*")):
            count = int(folder.name.rpartition("-")[2])
            if self.options.shards in (None, count):
                return folder, count
        count = self.options.shards or self._places(step)
        folder = self.out / FOLDER / f"{name}-in-{count}"
        folder.mkdir(parents=True)
        return folder, count

    def _log(self, step: Step, ending: str = "") -> Path:
        return self.out / FOLDER / f"{step.name}{ending}.log"

    def _command(self, words: Sequence[str], output: Path | None, log: Path) -> Command:
        log.parent.mkdir(parents=True, exist_ok=True)
        passed = {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("CAI_")}
        own = words if words[0] == "-m" else ["-m", "cai_cli", *words]
        return Command(own, str(Path.cwd()), passed, str(log), str(output) if output else None)

    def _run_tasks(self, step: Step, commands: Sequence[Command]) -> None:
        """Run commands whose outputs are files, as many at once as the cluster has room for."""
        import ray

        self._places(step)
        retried = {"max_retries": ATTEMPTS - 1, "retry_exceptions": [TaskKilledError]}
        task = ray.remote(run_command).options(num_cpus=self.options.cpus, num_gpus=self._gpus(step), **retried)
        running = {task.remote(command): command for command in commands}
        with cancelled(running):
            while running:
                (ready, *_), _ = ray.wait(list(running))
                command = running.pop(ready)
                code, node = _result(step, ready)
                if code and not _is_finished(Path(str(command.output))):
                    raise _failed(step, code, command)
                if len(commands) > 1:
                    console.say(f"[{step.name}] {len(commands) - len(running)} of {len(commands)} shards ({node})")

    # --- training stages ----------------------------------------------------------------------------------------

    def _train(self, step: Step, more: Sequence[str]) -> None:
        """Run a training step; after a lost node again, from the last checkpoint."""
        processes = group_size(step.config.accelerate_config, step.config.num_processes)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if processes == 1:
                    self._run_tasks(step, [self._command([*step.argv, *more], step.output, self._log(step))])
                else:
                    self._train_in_group(step, processes, [*step.argv, *more])
                return
            except TaskKilledError:
                if attempt == ATTEMPTS:
                    raise _gone(step) from None
                console.say(f"[{step.name}] a node or process was lost: training resumes")

    def _train_in_group(self, step: Step, processes: int, words: Sequence[str]) -> None:
        """Run the processes of a group, on as few nodes as hold them. Raises TaskKilledError when one is lost."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        per_node, count = self._nodes_for(step, processes)
        needs = {"CPU": self.options.cpus * per_node} | ({"GPU": per_node} if self._gpus(step) else {})
        group = placement_group([needs] * count, strategy="STRICT_SPREAD")
        try:
            ray.get(group.ready())

            def on(index: int, function: Any) -> Any:
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                return ray.remote(function).options(
                    num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), scheduling_strategy=place, max_retries=0
                )

            address, port = _result(step, on(0, address_and_port).remote())
            running = {}
            for index in range(count):
                node = Node(index, count, address, port)
                line = group_command(words, step.config.accelerate_config, processes, node)
                log = self._log(step, f"-node-{index + 1}")
                command = self._command(line, None if index else step.output, log)
                running[on(index, run_command).remote(command)] = command
            console.say(f"[{step.name}] {processes} processes on {count} nodes; their messages: {log.parent}/*.log")
            with cancelled(running):
                while running:
                    (ready, *_), _ = ray.wait(list(running))
                    command = running.pop(ready)
                    code, _ = _result(step, ready)
                    if code:
                        raise _failed(step, code, command)
        finally:
            remove_placement_group(group)

    # --- the cluster --------------------------------------------------------------------------------------------

    def _gpus(self, step: Step) -> int:
        """GPUs of a task of a step; for training, of each process."""
        if self.options.gpus is not None:
            return self.options.gpus
        elsewhere = str(step.settings.get("model", "")).startswith(("openai:", "scripted:")) and not step.stage.trains
        return int(not elsewhere and any(node.get("GPU") for node in nodes()))

    def _places(self, step: Step) -> int:
        """How many tasks of a step run at once. Raises CaiError `no-device`."""
        cpus, gpus = self.options.cpus, self._gpus(step)
        places = sum(capacity(node, cpus, gpus) for node in nodes())
        if not places:
            raise CaiError(
                f"step {step.name!r}: no node of the Ray cluster has {cpus} CPUs and {gpus} GPUs",
                hint="--task-cpus and --task-gpus set what a task needs; `ray status` shows what the nodes have",
                code="no-device",
            )
        return places

    def _nodes_for(self, step: Step, processes: int) -> tuple[int, int]:
        """Processes on each node, and the number of nodes. Raises CaiError `no-device`."""
        room = sorted((capacity(n, self.options.cpus, self._gpus(step)) for n in nodes()), reverse=True)
        for count in range(1, len(room) + 1):
            if processes % count == 0 and room[count - 1] >= processes // count:
                return processes // count, count
        raise CaiError(
            f"step {step.name!r}: the Ray cluster has no equal room for {processes} processes (its nodes hold "
            f"{', '.join(map(str, room))})",
            hint="another num-processes, or --task-cpus and --task-gpus",
            code="no-device",
        )


def is_sharded(step: Step) -> bool:
    """Whether a step runs in shards: its stage can, and the run file does not ask for one of them."""
    return "shard" in step.stage.config.option_names() and step.settings.get("shard") is None


@contextmanager
def cancelled(running: Mapping[Any, Command]) -> Any:
    """Kill the tasks that are still running when the block ends with an error."""
    import ray

    try:
        yield
    except BaseException:
        for reference in running:
            ray.cancel(reference, force=True)
        raise


def _result(step: Step, reference: Any) -> Any:
    """The result of a task. Raises TaskKilledError where it was killed and Ray does not retry it; CaiError for others,
    a shard that was killed again and again among them."""
    import ray
    import ray.exceptions as lost

    try:
        return ray.get(reference)
    except (lost.WorkerCrashedError, lost.NodeDiedError, TaskKilledError):
        if step.stage.trains:
            raise TaskKilledError from None
        raise _gone(step) from None
    except lost.RayError as error:
        reason = " ".join(str(error).split())[-300:]
        raise CaiError(f"step {step.name!r}: its task failed: {reason}", code="step-failed") from None


def _gone(step: Step) -> CaiError:
    return CaiError(
        f"step {step.name!r}: its task was killed {ATTEMPTS} times",
        hint="is there enough memory? The same `cai run` again resumes",
        code="step-failed",
    )


def _failed(step: Step, code: int, command: Command) -> CaiError:
    last = Path(command.log).read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    for line in last:
        console.say(console.safe(line))
    return CaiError(
        f"step {step.name!r} ended with exit code {code}: {step.shell}",
        hint=f"its messages: {command.log}; fix the error above, then run the same `cai run` again: it resumes",
        code="step-failed",
    )


def _is_finished(output: Path) -> bool:
    """Whether a shard is finished, as is one whose rows were all rejected though its command failed."""
    try:
        Part.open(output)
    except CaiError:
        return False
    return True
