"""The score head fitted before training."""

from pathlib import Path

import pytest
from helpers import (
    manifest_of,
    preference,
    stage,
    weights,
    write_rows,
)
from tiny import tiny_model_dir

from cai_cli.metrics.intervals import SHARE, mean_estimate
from cai_cli.phase2_feedback.linear_probe import regress

command = stage("train-pm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3, "eval_share": 0.0}


def test_a_fitted_head_distinguishes_pairs_before_training(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.8) for i in range(60)])
    run = {"model": str(model), "fit_head": True, **QUICK | {"eval_share": 0.5}}
    command(rows, tmp_path / "head", epochs=0, **run)
    start, trained = weights(model), weights(tmp_path / "head")
    assert all(bool((trained[name] == start[name]).all()) for name in start if name in trained)
    results = manifest_of(tmp_path / "head")["metrics"]
    assert results["steps"] == 0
    assert results["accuracy"] == results["head_accuracy"] == mean_estimate([1.0] * 30, SHARE)
    assert results["loss_gap"] < 0.05
    command(rows, tmp_path / "tuned", max_steps=3, **run)
    tuned = manifest_of(tmp_path / "tuned")["metrics"]
    assert tuned["held_out_loss_before"] == results["held_out_loss"] != tuned["held_out_loss"]


def test_a_fitted_head_gives_the_probabilities_of_its_labels() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    truth, x = rng.normal(size=8), rng.normal(size=(4000, 8))
    p = 1 / (1 + np.exp(-x @ truth))
    assert np.abs(regress(x, p, strength=10.0) - truth).max() < 0.02
    swapped = regress(-x, 1 - p, strength=10.0)  # the same pairs with chosen and rejected exchanged
    assert np.abs(swapped - regress(x, p, strength=10.0)).max() < 1e-4
