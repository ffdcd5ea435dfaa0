"""Steps that load a model are forks of one process without a GPU, and processes of their own beside one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import rows_in
from pipeline_cases import planned, start_and_kill
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.pipeline import step_process
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.step_process import StepProcesses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are forked on Linux only")
STEPS = """\
  first: {{command: sample, input: prompts.jsonl, model: {model}, max-new-tokens: 8, n: 2}}
  second: {{command: sample, input: prompts.jsonl, model: {model}, max-new-tokens: 8, limit: 3, batch-size: {batch}}}
"""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the processes that steps are forked from."""
    started: list[int] = []

    class Counted(step_process._ForkServer):
        def __init__(self) -> None:
            super().__init__()
            started.append(self._process.pid)

    monkeypatch.setattr(step_process, "_ForkServer", Counted)
    return started


@pytest.fixture
def steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    tiny_model_dir(folder / "tiny")
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    return planned(folder, STEPS.format(model="tiny", batch=2))


def outputs(steps: list[Step], processes: StepProcesses) -> list[bytes]:
    with processes:
        for step in steps:
            processes.run(step, True)
    return [step.output.read_bytes() for step in steps]


def test_forks_of_one_process_write_what_processes_of_their_own_write(
    steps: list[Step], servers: list[int], tmp_path: Path
) -> None:
    forked = outputs(steps, StepProcesses(quiet=True, devices=tmp_path))
    assert len(servers) == 1
    with pytest.raises(ProcessLookupError):  # it has ended with the run
        os.kill(servers[0], 0)
    (tmp_path / "nvidia0").touch()
    assert outputs(steps, StepProcesses(quiet=True, devices=tmp_path)) == forked
    assert len(servers) == 1
    assert [len(rows_in(step.output)) for step in steps] == [12, 3]


def test_a_failure_is_that_of_its_step_alone(
    steps: list[Step], servers: list[int], tmp_path: Path, folder: Path
) -> None:
    with StepProcesses(quiet=True, devices=tmp_path) as processes:
        (folder / "prompts.jsonl").rename(folder / "away")
        with pytest.raises(CaiError, match="step 'first' ended with exit code 1: cai sample prompts.jsonl"):
            processes.run(steps[0], False)
        (folder / "away").rename(folder / "prompts.jsonl")
        processes.run(steps[0], False)
        assert len(servers) == 1
        os.kill(servers[0], signal.SIGKILL)
        processes.run(steps[1], False)
    assert [len(rows_in(step.output)) for step in steps] == [12, 3]


def test_steps_on_a_server_or_script_start_nothing_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, servers: list[int], tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    steps = planned(folder, STEPS.format(model="scripted:script.jsonl", batch=2))
    outputs(steps, StepProcesses(quiet=True, devices=tmp_path))
    assert servers == []


def test_where_the_libraries_cannot_be_imported_the_step_says_so_itself(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    broken = folder / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with StepProcesses(quiet=True, devices=tmp_path) as processes, pytest.raises(CaiError, match="exit code 3"):
        processes.run(steps[0], False)


def test_an_interrupt_while_the_libraries_are_imported_starts_no_step(
    steps: list[Step], servers: list[int], tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with StepProcesses(quiet=True, devices=tmp_path) as processes, pytest.raises(KeyboardInterrupt):
            processes.run(steps[0], False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(servers) == 1
    assert list(Path("out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_fork_ends_with_its_run_and_resumes(
    sent: signal.Signals, code: int, steps: list[Step], servers: list[int], folder: Path
) -> None:
    slow = STEPS.format(model="tiny", batch=1).replace("limit: 3", "n: 60")
    calm = outputs(planned(folder, slow), StepProcesses(quiet=True))
    assert len(servers) == (1 if StepProcesses().can_fork else 0)
    second = folder / "out/second.jsonl"
    for path in (folder / "out").iterdir():
        path.unlink()
    partial = second.with_name("second.jsonl.partial")
    assert start_and_kill(folder, "run.yaml", partial, sent) == code
    kept = partial.read_bytes().count(b"\n")
    assert 0 < kept < 360
    done = subprocess.run(
        [sys.executable, "-m", "cai_cli", "run", "run.yaml", "--out", "out"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{kept} rows are finished" in done.stderr
    assert [step.output.read_bytes() for step in steps] == calm
