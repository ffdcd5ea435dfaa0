"""Python files of the folder in which `cai` runs are never run in place of libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai
from helpers import rows_in, write_rows
from tiny import tiny_model_dir

LIBRARIES = ("datasets", "queue", "grp", "secrets", "typer", "yaml", "trl", "accelerate")
RUN_FILE = """
name: r
model: scripted:replies.jsonl
steps:
  samples: {command: sample, input: prompts.txt}
  model: {command: sft, input: rows.jsonl, model: tiny, max-steps: 1, eval-share: 0, device: cpu}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w'); raise SystemExit('a file of the folder was run')\n")
    tiny_model_dir(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("Name a fruit.\n")
    (tmp_path / "r.yaml").write_text(RUN_FILE)
    write_rows(tmp_path / "replies.jsonl", [{"contains": None, "replies": ["A pear."]}])
    message = [{"role": "user", "content": "Name a fruit."}]
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": message, "completion": [{"role": "assistant", "content": "Pear."}]}]
    )
    return tmp_path


def test_the_steps_of_a_run_import_their_libraries_and_not_files_of_the_folder(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cai_cli", "run", "r.yaml", "--out", "out"],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "was-run").exists()
    assert rows_in(folder / "out/samples.jsonl")[0]["completion"][0]["content"] == "A pear."
    assert (folder / "out/model/model.safetensors").exists()


def test_every_python_that_a_command_starts_ignores_the_folder(cai: Cai, folder: Path) -> None:
    cai("--version")
    script = "import queue, secrets, sys; print(queue.__file__)"
    child = subprocess.run([sys.executable, "-c", script], cwd=folder, check=False, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert not (folder / "was-run").exists()
