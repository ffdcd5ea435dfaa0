"""Experiment trackers (`--report-to`), to which the trainers log what metrics.jsonl holds."""

import os
from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from cai_cli.common.errors import UsageError
from cai_cli.runtime.output_files import sidecar

PROJECT = "cai"


class Tracker(StrEnum):
    """An experiment tracker, by its name in transformers, which is also that of its package."""

    MLFLOW = "mlflow"
    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"
    WANDB = "wandb"


def check_installed(tracker: Tracker | None) -> None:
    """Raises UsageError (`missing-dependency`) where the package of a tracker is missing."""
    if tracker and find_spec(tracker) is None:
        raise UsageError(
            f"--report-to {tracker}: not installed", hint=f"pip install '.[{tracker}]'", code="missing-dependency"
        )


def name_project(tracker: Tracker | None, output: Path) -> None:
    """Name the project of a run, unless the tracker's own environment variables do. TensorBoard writes beside OUT."""
    settings = {
        Tracker.MLFLOW: ("MLFLOW_EXPERIMENT_NAME", PROJECT),
        Tracker.TENSORBOARD: ("TENSORBOARD_LOGGING_DIR", str(sidecar(output, "tensorboard"))),  # OUT.partial is removed
        Tracker.WANDB: ("WANDB_PROJECT", PROJECT),
    }
    if tracker in settings:
        name, value = settings[tracker]
        os.environ.setdefault(name, value)


def finish(names: Sequence[str]) -> None:
    """End the runs of these trackers. wandb would do it at exit, and print on stdout after the summary."""
    if Tracker.WANDB in names:
        import wandb

        wandb.finish()
