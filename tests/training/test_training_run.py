"""A training run's output: finished, resumed after a kill, or refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers import interrupted_after, largest_difference, manifest_of, preference, revision, stage, write_rows
from tiny import CHATML, tiny_model_dir
from transformers import AutoTokenizer

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.training import training_run

command = stage("sft")

QUICK: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rev.jsonl", [revision(i) for i in range(12)])


def stamp(directory: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in directory.rglob("*")}


def test_a_finished_output_is_not_changed_and_its_summary_is_printed(
    model: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command(rows, out, model=str(model), as_json=True, **QUICK)
    first, before = json.loads(capsys.readouterr().out), stamp(out)
    command(rows, out, model=str(model), as_json=True, save_steps=7, **QUICK)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == first | {"status": "already finished"}
    assert "already finished" in captured.err
    assert stamp(out) == before


@pytest.mark.parametrize("name", ["sft", "train-pm"])
def test_a_model_with_named_chat_templates_is_saved_with_them(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(tmp_path / "named"))
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML.replace("helpful", "tooling")}
    tokenizer.save_pretrained(tmp_path / "named")
    rows = [revision(i) for i in range(4)] if name == "sft" else [preference(i) for i in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    stage(name)(source, tmp_path / "out", model=tmp_path / "named", device="cpu", **QUICK)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("killed_at", ["sidecar written", "renamed", "work removed"])
def test_a_kill_while_the_output_is_renamed_is_completed_by_the_next_run(
    model: Path, rows: str, tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command(rows, tmp_path / "whole", model=str(model), **QUICK)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def dying_removal(path: Path) -> None:
        if out.exists():
            raise KeyboardInterrupt

    replaced = {"sidecar written": 0, "renamed": 1, "work removed": 1}[killed_at]
    replace = os.replace

    def dying_replace(source: Any, target: Any) -> None:
        nonlocal replaced
        if Path(target).name in ("out", "out.manifest.json"):
            if replaced == 0:
                raise KeyboardInterrupt
            replaced -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.os, "replace", dying_replace)
        if killed_at == "renamed":
            patch.setattr(training_run, "_remove_tree", dying_removal)
        with pytest.raises(KeyboardInterrupt):
            command(rows, out, model=str(model), **QUICK)
    assert out.exists() == (killed_at != "sidecar written")
    assert not (tmp_path / "out.manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingJob, "_train", die)  # nothing is trained again
        command(rows, out, model=str(model), **QUICK)
    assert manifest_of(out)["status"] == "finished"
    assert largest_difference(out, tmp_path / "whole") == 0
    assert not list(tmp_path.glob("out.partial*"))


def test_a_second_writer_is_refused(model: Path, rows: str, tmp_path: Path) -> None:
    with FileLock(tmp_path / "out.lock"), pytest.raises(CaiError) as error:
        command(rows, tmp_path / "out", model=str(model), **QUICK)
    assert error.value.code == "output-locked"


def test_a_directory_that_cai_did_not_make_is_never_removed(model: Path, rows: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CaiError) as error:
            command(rows, mine, model=str(model), overwrite=overwrite, **QUICK)
        assert error.value.code == "not-made-by-cai"
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_the_model_to_start_from_is_never_the_output(model: Path, rows: str, tmp_path: Path) -> None:
    start = shutil.copytree(model, tmp_path / "start")
    with pytest.raises(CaiError) as error:
        command(rows, start, model=str(start), overwrite=True, **QUICK)
    assert error.value.code == "input-is-output"
    assert (start / "model.safetensors").exists()


def test_a_model_cannot_go_to_stdout(model: Path, rows: str) -> None:
    with pytest.raises(UsageError) as error:
        command(rows, Path("-"), model=str(model), **QUICK)
    assert error.value.code == "invalid-option"


def test_batch_size_and_start_model_decide_the_output_but_save_steps_do_not(
    model: Path, rows: str, tmp_path: Path
) -> None:
    other = tiny_model_dir(tmp_path / "other", seed=1)
    with interrupted_after(2):
        command(rows, tmp_path / "out", model=str(model), save_steps=1, **QUICK)
    with pytest.raises(CaiError, match=r"settings\.batch_size: 4 -> 2"):
        command(rows, tmp_path / "out", model=str(model), save_steps=1, **QUICK | {"batch_size": 2})
    with pytest.raises(CaiError) as error:
        command(rows, tmp_path / "out", model=str(other), save_steps=1, **QUICK)
    assert error.value.code == "other-run"
    command(rows, tmp_path / "out", model=str(model), save_steps=9, **QUICK)
