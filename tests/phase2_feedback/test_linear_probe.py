"""The score head fitted before training."""

import json
import random
import warnings
from pathlib import Path

import pytest
from helpers import (
    manifest_of,
    preference,
    stage,
    weights,
    write_rows,
)
from safetensors.torch import load_file
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.schema import Message
from cai_cli.metrics.intervals import SHARE, mean_estimate
from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.models.names import resolve
from cai_cli.models.reading import ReadAt, layer_of, place_of
from cai_cli.phase2_feedback.linear_probe import regress, save_head
from cai_cli.reward.preference_model import score_conversations

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


def test_a_head_is_written_without_a_warning(model: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        save_head(load_reward_model(model, new_head_seed=0), model, tmp_path / "head")
    assert [str(one.message) for one in found if issubclass(one.category, FutureWarning)] == []


def test_a_head_alone_is_written_as_an_adapter_of_its_model(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.8) for i in range(30)])
    run = {"model": str(model), "fit_head": True, "keep_adapter": True, **QUICK}
    command(rows, tmp_path / "pm", epochs=0, **run)
    adapter = tmp_path / "pm/adapter"
    assert [list(each.shape) for each in load_file(adapter / "adapter_model.safetensors").values()] == [[1, 32]]
    merged, whole = weights(resolve(f"{model}+{adapter}")), weights(tmp_path / "pm")
    assert merged.keys() == whole.keys()
    assert all(bool((merged[name] == whole[name]).all()) for name in whole)
    assert place_of(resolve(f"{model}+{adapter}")) is ReadAt.END_OF_TURN


def mixed_words(helpful: int, rng: random.Random) -> str:
    """Nine words in a random order before a last one that is always the same."""
    words = ["helpful"] * helpful + ["harmful"] * (9 - helpful)
    return " ".join([*rng.sample(words, 9), "word"])


def test_a_head_on_the_mean_over_the_reply_finds_what_its_last_token_does_not_show(model: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    pairs = [preference(i, 1.0, mixed_words(5, rng), mixed_words(4, rng)) for i in range(120)]
    rows = write_rows(tmp_path / "prefs.jsonl", pairs)
    run = {"model": str(model), "fit_head": True, "epochs": 0, "keep_adapter": True, **QUICK, "eval_share": 0.5}
    command(rows, tmp_path / "last", layer=1, **run)
    command(rows, tmp_path / "mean", layer=1, read_at="mean-over-reply", **run)
    last, mean = (manifest_of(tmp_path / name)["metrics"]["accuracy"]["value"] for name in ("last", "mean"))
    assert mean >= 0.95
    assert mean > last
    merged = resolve(f"{model}+{tmp_path / 'mean/adapter'}")
    assert (place_of(merged), layer_of(merged)) == (ReadAt.MEAN_OVER_REPLY, 1)
    chats = [
        [Message(role="user", content="q"), Message(role="assistant", content=mixed_words(n, rng))] for n in (4, 5)
    ]
    whole, adapted = (
        score_conversations(load_reward_model(path), load_tokenizer(path), chats)
        for path in (tmp_path / "mean", merged)
    )
    assert whole == pytest.approx(adapted, abs=1e-5)
    assert whole[0] < whole[1]
    held_out = [json.loads(line) for line in (tmp_path / "mean/held_out.jsonl").read_text().splitlines()]
    assert sum(pair["chosen_score"] > pair["rejected_score"] for pair in held_out) / len(held_out) == mean
    card = (tmp_path / "mean/README.md").read_text()
    assert "mean over the tokens of its last reply" in card
    assert "layer 1" in card


def test_all_weights_can_be_trained_for_the_mean_over_the_reply(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i) for i in range(30)])
    run = {"model": str(model), "read_at": "mean-over-reply", "max_steps": 2, **QUICK}
    command(rows, tmp_path / "pm", **run)
    assert place_of(tmp_path / "pm") is ReadAt.MEAN_OVER_REPLY
    with pytest.raises(UsageError) as refused:
        command(rows, tmp_path / "other", layer=1, **run)
    assert refused.value.code == "option-conflict"
    with pytest.raises(CaiError) as missing:
        command(rows, tmp_path / "other", layer=99, fit_head=True, epochs=0, model=str(model), **QUICK)
    assert missing.value.code == "invalid-layer"


def test_a_head_of_another_model_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.8) for i in range(30)])
    run = {"model": str(model), "fit_head": True, "keep_adapter": True, **QUICK}
    command(rows, tmp_path / "pm", epochs=0, **run)
    other = tiny_model_dir(tmp_path / "other", seed=1)
    with pytest.raises(CaiError) as refused:
        resolve(f"{other}+{tmp_path / 'pm/adapter'}")
    assert refused.value.code == "invalid-model"
    copy = tiny_model_dir(tmp_path / "copy" / model.name, seed=1)
    resolve(f"{copy}+{tmp_path / 'pm/adapter'}")
    assert "another copy" in capsys.readouterr().err


def test_only_a_head_that_is_not_trained_further_is_kept_alone(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prefs.jsonl", [preference(i, 0.8) for i in range(30)])
    with pytest.raises(UsageError) as refused:
        command(rows, tmp_path / "pm", model=str(model), fit_head=True, keep_adapter=True, epochs=1.0, **QUICK)
    assert refused.value.code == "option-conflict"
