"""The configuration of a training run: precision, batches and what the trainer gets."""

from dataclasses import replace
from pathlib import Path

import pytest

from cai_cli.training.config import TrainingConfig

CONFIG = TrainingConfig(
    batch_size=4, gradient_accumulation=3, learning_rate=0.1, save_steps=5, seed=7, device="cpu", epochs=2.0
)


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [
        ("cpu", "auto", "float32"),
        ("cuda", "auto", "bfloat16"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "float32", "float32"),
    ],
)
def test_the_precision_follows_the_device_unless_it_is_given(device: str, dtype: str, precision: str) -> None:
    config = replace(CONFIG, device=device, dtype=dtype)
    assert config.precision == precision
    arguments = config.arguments(Path("out.partial"))
    assert (arguments["bf16"], arguments["use_cpu"]) == (precision == "bfloat16", device == "cpu")


def test_no_epochs_and_no_steps_is_no_training() -> None:
    assert CONFIG.trains
    assert not replace(CONFIG, epochs=0.0).trains
    assert replace(CONFIG, epochs=0.0, max_steps=1).trains


def test_a_batch_is_the_product_of_its_parts_and_one_process_repeats_no_row() -> None:
    assert CONFIG.effective_batch == 12
    facts = CONFIG.facts("shuffled", rows=13)
    assert (facts["effective_batch"], facts["repeated_rows"], facts["seed"]) == (12, 0, 7)


def test_of_several_processes_each_gets_as_many_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_cli.training.distributed.world_size", lambda: 2)
    assert CONFIG.effective_batch == 24
    assert [CONFIG.facts("", rows)["repeated_rows"] for rows in (8, 13, 16)] == [0, 3, 0]


def test_an_adapter_is_made_only_on_request() -> None:
    assert CONFIG.peft_config() is None
    assert replace(CONFIG, lora_rank=3).peft_config(classifier=True).r == 3


def test_trl_does_not_spread_the_reference_model_of_sharded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CONFIG.reference_options is None
    monkeypatch.setattr("cai_cli.training.distributed.weights_are_sharded", lambda: True)
    assert CONFIG.reference_options == {"dtype": "float32", "device_map": None}
