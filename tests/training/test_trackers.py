"""Experiment trackers."""

import json
import os
from pathlib import Path

import pytest
from helpers import preference, revision, rows_in, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.training.trackers import Tracker, name_project


@pytest.fixture
def no_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_EXPERIMENT_NAME", "TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_project")
def test_every_trainer_of_rows_logs_each_step_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model_dir(tmp_path / "model")
    revisions = write_rows(tmp_path / "revisions.jsonl", [revision(i) for i in range(8)])
    pairs = write_rows(tmp_path / "pairs.jsonl", [preference(i) for i in range(8)])
    for name, rows in (("sft", revisions), ("train-pm", pairs), ("dpo", pairs)):
        out = tmp_path / name
        os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
        stage(name)(rows, out, model=str(model), max_steps=2, batch_size=4, gradient_accumulation=1, eval_share=0.0,
                    report_to="tensorboard")  # fmt: skip
        events = EventAccumulator(f"{out}.tensorboard").Reload()
        (tag,) = [tag for tag in events.Tags()["scalars"] if tag.rpartition("/")[2] == "loss"]
        losses = {
            row["step"]: pytest.approx(row["loss"], abs=1e-5) for row in rows_in(out / "metrics.jsonl") if row["step"]
        }
        assert {event.step: event.value for event in events.Scalars(tag)} == losses
        assert len(losses) == 2


def test_what_a_library_prints_while_training_stays_out_of_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model_dir(tmp_path / "model")
    rows = write_rows(tmp_path / "revisions.jsonl", [revision(i) for i in range(4)])
    monkeypatch.setattr("cai_cli.training.trackers.finish", lambda _: print("a run was logged"))
    stage("sft")(rows, tmp_path / "out", model=str(model), max_steps=1, eval_share=0.0, as_json=True)
    printed = capfd.readouterr()
    assert json.loads(printed.out)["steps"] == 1
    assert "a run was logged" in printed.err


@pytest.mark.usefixtures("no_project")
def test_a_project_is_named_unless_the_user_named_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in Tracker:
        name_project(tracker, tmp_path / "out")
    assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "cai"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "out.tensorboard")
    monkeypatch.setenv("WANDB_PROJECT", "safety")
    name_project(Tracker.WANDB, tmp_path / "out")
    assert os.environ["WANDB_PROJECT"] == "safety"
