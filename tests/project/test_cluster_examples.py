"""The job scripts in examples/cluster do what they say, run here task by task without a cluster."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import manifest_of, rows_in, sample_row, write_rows
from loopback import Loopback

CLUSTER = Path(__file__).parents[2] / "examples/cluster"
MODEL = "--model scripted:script.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Samples, a script, and `cai` and `srun` on the PATH."""
    write_rows(tmp_path / "samples.jsonl", (sample_row(i) for i in range(20)))
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two."]}])
    (tmp_path / "bin").mkdir()
    for name, line in (("cai", f'exec {sys.executable} -m cai_cli "$@"'), ("srun", 'exec "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(folder: Path, command: list[str], **variables: str) -> None:
    environment = {**os.environ, **variables, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=60)


def test_the_slurm_array_and_its_merge_make_the_whole_output(folder: Path) -> None:
    script = ["bash", str(CLUSTER / "slurm.sbatch")]
    variables = {"STAGE": f"critique-revise samples.jsonl --rounds 1 {MODEL}", "OUT": "out.jsonl", "SHARDS": "2"}
    for task in ("1", "2"):
        run(folder, script, SLURM_ARRAY_TASK_ID=task, **variables)
    run(folder, script, **variables)
    assert len(rows_in(folder / "out.jsonl")) == 20


def test_the_kubernetes_jobs_make_the_whole_output(folder: Path) -> None:
    shards, merge = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    count = shards["spec"]["completions"]
    assert count == 16

    def command_of(job: dict, few: str) -> list[str]:  # type: ignore[type-arg]
        container = job["spec"]["template"]["spec"]["containers"][0]
        words = [*container["command"], *container["args"]]
        few_shards = words[-1].replace("/16", f"/{few}").replace("seq 16", f"seq {few}")
        return [*words[:-1], few_shards.replace("--rounds 4", f"--rounds 1 {MODEL}")]

    for index in range(2):
        run(folder, command_of(shards, "2"), JOB_COMPLETION_INDEX=str(index))
    run(folder, command_of(merge, "2"))
    assert len(rows_in(folder / "revisions.jsonl")) == 20


FAKE_VLLM = """\
import sys, threading
sys.path.insert(0, {tests!r})
from loopback import Loopback, good, http
with Loopback(lambda r: http({{}}) if r.path == "/health" else good(r), int(sys.argv[sys.argv.index("--port") + 1])):
    threading.Event().wait()
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
@pytest.mark.parametrize("exit_code", [0, 1])
def test_the_servers_of_the_slurm_job_start_and_stop_with_it(folder: Path, exit_code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as any_port:
        port = any_port.getsockname()[1]
    (folder / "serve.py").write_text(FAKE_VLLM.format(tests=str(Path(__file__).parents[1])))
    for name, line in (
        ("vllm", f'exec {sys.executable} {folder}/serve.py "$@"'),
        ("srun", 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"'),
        ("scontrol", "echo 127.0.0.1; echo localhost"),
    ):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    stage = f"critique-revise {'samples.jsonl' if exit_code == 0 else 'missing.jsonl'} --rounds 1"
    variables = {"STAGE": stage, "OUT": "out.jsonl", "MODEL": "m", "SERVER": f"vllm serve m --port {port}"}
    variables |= {"PORT": str(port), "SLURM_JOB_NODELIST": "a,b", "WAIT": "0.1"}
    script = ["bash", str(CLUSTER / "slurm_server.sbatch")]
    if exit_code:
        with pytest.raises(subprocess.CalledProcessError):
            run(folder, script, **variables)
    else:
        run(folder, script, **variables)
        assert len(rows_in(folder / "out.jsonl")) == 20
        used = manifest_of(folder / "out.jsonl")["run"]["usage"]["base_url"]
        assert used == f"http://127.0.0.1:{port}/v1,http://localhost:{port}/v1"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))


def test_the_server_of_a_kubernetes_pod_is_a_sidecar_that_the_stage_asks(folder: Path) -> None:
    job = yaml.safe_load((CLUSTER / "kubernetes_server.yaml").read_text())["spec"]["template"]["spec"]
    (server,), (stage,) = job["initContainers"], job["containers"]
    assert (server["restartPolicy"], server["startupProbe"]["httpGet"]["port"]) == ("Always", 8000)
    with Loopback() as fake:
        words = stage["args"][0].replace("http://localhost:8000/v1", fake.url).replace("--rounds 4", "--rounds 1")
        run(folder, [*stage["command"], words], JOB_COMPLETION_INDEX="1")
        assert len(fake.requests) == 2 * len(rows_in(folder / "revisions.shard-2.jsonl")) > 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_server.sbatch"])
def test_the_slurm_scripts_have_no_shell_mistakes(name: str) -> None:
    subprocess.run(["shellcheck", str(CLUSTER / name)], check=True)
