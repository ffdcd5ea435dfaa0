"""`cai` as real processes without the half second that an interpreter takes to start: one that has imported everything
forks for each run. A run is a process of its own: it can be traced, killed, denied its rights and robbed of its disk.

`strace` does the injecting: it is attached to a run before its first step, and kills or fails it at its Nth call.
"""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="STRACE IS MISSING: no fault can be injected at a system call"
)
NOBODY = 65534


@dataclass(frozen=True)
class Ended:
    """`code` is negative for a signal, as subprocess has it."""

    code: int
    stderr: str

    def assert_is_one_error(self) -> None:
        """Exit code 1 and `error: ...`, at most with its `hint: ...`; no traceback, no second complaint."""
        assert self.code == 1, self
        said = [line for line in self.stderr.splitlines() if not line.startswith(("resuming", "out."))]
        assert said, self
        assert said[0].startswith("error: "), self
        assert len(said) <= 2, self
        assert all(line.startswith("hint: ") for line in said[1:]), self


class Forks:
    """`forks.run("sample", "in.jsonl", ..., cwd=folder)`; with `inject` under strace, as `strace -e inject=` has it."""

    def __init__(self, *modules: str, own_cache: bool = True) -> None:
        """`modules`: what is imported beforehand beside the command line. `own_cache`: without the models that are
        already fetched."""
        self._cache = tempfile.TemporaryDirectory()  # another test that writes to a shared one would change the calls
        cache = {"CAI_CACHE": self._cache.name} if own_cache else {}
        self._mother = subprocess.Popen(
            [sys.executable, "-u", __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **cache},
        )  # fmt: skip

    def close(self) -> None:
        self._mother.communicate(timeout=10)
        self._cache.cleanup()

    def _read(self) -> Any:
        assert self._mother.stdout
        return json.loads(self._mother.stdout.readline())

    def start(self, *words: str, cwd: Path, **limits: int | bool) -> int:
        """The pid of the run. `limits`: `uid`, `file_bytes` (RLIMIT_FSIZE), `held` (until the FIFO `.go` holds a byte)."""
        assert self._mother.stdin
        order = {"words": words, "cwd": str(cwd), **limits}
        self._mother.stdin.write(json.dumps(order) + "\n")
        self._mother.stdin.flush()
        self._stderr = cwd / ".stderr"
        return int(self._read())

    def wait(self) -> Ended:
        return Ended(int(self._read()), self._stderr.read_text(errors="replace"))

    def run(self, *words: str, cwd: Path, **limits: int) -> Ended:
        self.start(*words, cwd=cwd, **limits)
        return self.wait()

    def run_injected(
        self, *words: str, cwd: Path, inject: str, children: bool = False, log: Path | None = None, **limits: int
    ) -> Ended:
        """As `run`, with `inject` such as "fsync:signal=SIGKILL:when=3"; `children`: also in the processes that it
        starts. `log` takes what strace saw of these calls."""
        go = cwd / ".go"
        go.unlink(missing_ok=True)
        os.mkfifo(go)
        pid = self.start(*words, cwd=cwd, held=True, **limits)
        calls = inject.partition(":")[0]
        faults = ["-e", f"inject={inject}"] if ":" in inject else []
        tracer = subprocess.Popen(
            ["strace", *(["-f"] if children else []), "-y", "-e", f"trace={calls}", *faults,
             "-o", str(log or os.devnull), "-p", str(pid)],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert tracer.stderr
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached
        with open(os.open(go, os.O_WRONLY | os.O_NONBLOCK), "wb") as gate:
            gate.write(b".")
        ended = self.wait()
        tracer.wait(60)
        tracer.stderr.close()
        return ended


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for `what`; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def held(folder: Path) -> bool:
    """Whether any process still writes an output in `folder`."""
    for lock in folder.glob("*.lock"):
        with suppress(FileNotFoundError), lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def files_of(folder: Path, pattern: str = "out.jsonl*") -> dict[str, Any]:
    """Name -> bytes of an output and its sidecars; of manifests the provenance and counts, without times."""
    return {path.name: _content(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def _content(path: Path) -> Any:
    data = path.read_bytes()
    try:
        manifest = json.loads(data) if "manifest.json" in path.name else None
    except ValueError:  # a torn one, under a name that is no manifest's yet
        manifest = None
    if manifest is None:
        return data
    return {name: manifest.get(name) for name in ("status", "provenance", "counts", "rows")}


def clear(folder: Path, pattern: str = "out.jsonl*") -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- the process that forks ---------------------------------------------------------------------------------------


def _mother(modules: Sequence[str]) -> None:
    import gc
    import importlib

    sys.dont_write_bytecode = True  # the calls of a run are to be the same every time
    for module in ("cai_cli.cli.app", "cai_cli.engines.scripted", "importlib.metadata", *modules):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        gate = os.open(f"{order['cwd']}/.go", os.O_RDWR) if order.get("held") else None
        opened, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(opened)
            _child(order, gate, ready)
        if gate is not None:
            os.close(gate)
        os.close(ready)
        os.read(opened, 1)  # ends when the child has opened its own files, which no tracer is to see
        os.close(opened)
        print(pid)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status))


def _child(order: dict[str, Any], gate: int | None, ready: int) -> None:
    from cai_cli.cli.app import main

    os.chdir(order["cwd"])
    fds = os.open(os.devnull, os.O_RDWR), os.open(".stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(fds[0], 0)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in (*fds, ready):
        os.close(fd)
    if gate is not None:
        os.read(gate, 1)
        os.close(gate)
    if "file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    if "uid" in order and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(order["uid"])
        os.setuid(order["uid"])
    sys.argv = ["cai", *order["words"]]
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(int(stop.code or 0))  # taking the interpreter apart costs more than the run


if __name__ == "__main__":
    _mother(sys.argv[1:])
