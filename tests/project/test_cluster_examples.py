"""The job scripts in examples/cluster do what they say, run here task by task without a cluster."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import rows_in, sample_row, write_rows

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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_the_slurm_script_has_no_shell_mistakes() -> None:
    subprocess.run(["shellcheck", str(CLUSTER / "slurm.sbatch")], check=True)
