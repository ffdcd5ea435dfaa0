"""`cai` called in process: the real command line without the half second a new interpreter takes."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cai_cli.cli import app
from cai_cli.cli.app import main
from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.reward.server import RewardModel, RewardServer

# Tests compare with the results of a CPU; `bench/gpu_check.sh` runs those that hold on a GPU too.
if not os.environ.get("CAI_TEST_ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

Ran = Callable[[str], None]


@pytest.fixture
def ran(record_property: Callable[[str, object], None]) -> Ran:
    """`ran("72 kills")`: the extent of a fault test, printed at the end of the run."""
    return lambda text: record_property("ran", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("passed", ()):
        for name, text in report.user_properties:
            if name == "ran":
                terminalreporter.write_line(f"{Path(report.nodeid.split('::')[0]).stem}: {text}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the last line that `make faults` promises: N passed, N failed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(config, "workerinput"):
        count = {name: len(reporter.stats.get(name, ())) for name in ("passed", "failed", "error")}
        print(f"{count['passed']} passed, {count['failed'] + count['error']} failed")


@dataclass(frozen=True)
class Done:
    """The result of a command. `error` is the code of the error that ended it, or None."""

    code: int
    stdout: str
    stderr: str
    error: str | None = None


Cai = Callable[..., Done]


@pytest.fixture
def cai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cai]:
    """`cai("sample", "in.jsonl", "-o", "out.jsonl", stdin=b"...")`, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # main() sets it: it is restored after the test
    on_terminate = signal.getsignal(signal.SIGTERM)
    # A shell that starts the tests in the background leaves SIGINT ignored.
    on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    errors: list[str] = []
    run = app._run

    def recorded() -> Any:
        try:
            return run()
        except CaiError as error:
            errors.append(error.code)
            raise

    monkeypatch.setattr(app, "_run", recorded)

    def call(*words: str, stdin: bytes = b"") -> Done:
        errors.clear()
        monkeypatch.setattr(sys, "argv", ["cai", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Done(int(stop.value.code or 0), *capsys.readouterr(), *errors)

    yield call
    signal.signal(signal.SIGTERM, on_terminate)
    signal.signal(signal.SIGINT, on_interrupt)
    console.set_quiet(False)
    console.set_rows_on_stdout(False)


SMALL = """\
kind: critique-revision
name: small
principles:
  - {id: a, theme: harm, critique: "Look: {here}.", revision: Rewrite it.}
  - {id: b, critique: Look there., revision: Do it again.}
examples:
  - messages: [{role: user, content: "why?"}, {role: assistant, content: because.}]
    critique_request: Any harm?
    critique: None.
    revision_request: Redo it.
    revision: Because of this.
"""
COMPARE = """\
kind: preference
name: compare
principles: [{id: c, comparison: "Which is kinder?"}]
examples:
  - {messages: [{role: user, content: "who?"}], options: [me, you], answer: A}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The file of a constitution of two principles; `compare.yaml` beside it has one to compare replies by."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    (tmp_path / "compare.yaml").write_text(COMPARE)
    return path


class Serve:
    """`serve(model)` starts a reward server on loopback, which ends with the test, and returns its address."""

    def __init__(self) -> None:
        self.servers: list[RewardServer] = []

    def __call__(self, model: RewardModel) -> str:
        server = RewardServer(model, "127.0.0.1", 0)
        self.servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def serve() -> Iterator[Serve]:
    made = Serve()
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()
