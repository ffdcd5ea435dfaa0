"""What trainers say about memory before they load a model, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import preference, revision, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.training import memory_check
from cai_cli.training.activations import ModelShape, shape_of_dir
from cai_cli.training.config import TrainingConfig
from cai_cli.training.memory import Sharding, Workload
from cai_cli.training.memory_check import DeviceMemory, Setting, nearest, sharding_here, sharding_of

MIB = 2**20
GPU = TrainingConfig(
    batch_size=8, gradient_accumulation=2, learning_rate=1e-3, save_steps=1, seed=0, device="cuda",
    gradient_checkpointing="off",
)  # fmt: skip
WORK = Workload(256, sequences=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shape(model: Path) -> ModelShape:
    return shape_of_dir(model)


def on(free: float, shape: ModelShape, training: TrainingConfig = GPU, **more: Any) -> Setting:
    return Setting(shape, training, WORK, more.pop("sharding", Sharding()), DeviceMemory("of a test", free, **more))


def test_the_nearest_settings_fit_and_change_as_little_as_possible(shape: ModelShape) -> None:
    whole = on(1e12, shape).memory.peak
    assert not on(1.1 * whole, shape).impossible
    found = {}
    for share in (0.98, 0.8, 0.6, 0.4):
        setting = on(share * whole, shape)
        assert setting.impossible
        fitting = nearest(setting)
        assert fitting
        assert all(one.recommended for one in fitting)
        found[share] = fitting[0].options
    assert found[0.98] == ("--gradient-checkpointing on",)
    assert all(options[0] == "--gradient-checkpointing on" for options in found.values())
    assert "--batch-size" in found[0.4][-1]


def test_a_smaller_batch_keeps_the_rows_of_a_step(shape: ModelShape) -> None:
    whole = on(1e12, shape, replace(GPU, gradient_checkpointing="on")).memory.peak
    one = nearest(on(0.7 * whole, shape, replace(GPU, gradient_checkpointing="on")))[0]
    assert one.training.batch_size * one.training.gradient_accumulation == 16
    assert f"--batch-size {one.training.batch_size}" in one.options[-1]


def test_what_no_option_makes_fit_is_said_to_fit_nowhere(shape: ModelShape) -> None:
    with pytest.raises(CaiError) as refused:
        on(1000.0, shape).refuse_impossible("sft")
    assert refused.value.code == "not-enough-memory"
    assert refused.value.hint == "no option makes it fit such a device"


def test_on_a_cpu_only_what_is_there_all_the_time_is_refused(shape: ModelShape) -> None:
    training = replace(GPU, device="cpu", dtype="float32")
    memory = on(1e12, shape, training).memory
    assert memory.held < memory.peak / 2
    assert not on(1.1 * memory.held, shape, training, on_cpu=True).impossible
    assert on(0.9 * memory.held, shape, training, on_cpu=True).impossible
    assert on(1.1 * memory.held, shape, training, on_cpu=True, sharding=Sharding(2)).impossible  # both in one RAM


def test_what_processes_divide_is_read_from_the_config_and_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding_of(None, None) == Sharding()
    assert sharding_of("multi_gpu", 4) == Sharding(4, 0)
    assert sharding_of("zero2", None) == Sharding(8, 2)
    assert sharding_of("zero3", None) == Sharding(8, 3)
    assert sharding_of("fsdp2", 16) == Sharding(16, 3)
    assert sharding_here() == Sharding()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert sharding_here() == Sharding(4, 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert sharding_here() == Sharding(4, 3, offloads=True)


ROWS = {"sft": revision, "train-pm": preference, "dpo": preference, "rl": lambda i: {"prompt": f"Question {i}?"}}


@pytest.mark.parametrize("name", ROWS)
def test_a_trainer_refuses_before_it_touches_its_output(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "this_device", lambda _: DeviceMemory("of RAM", 64_000.0, on_cpu=True))
    source = write_rows(tmp_path / "rows.jsonl", [ROWS[name](i) for i in range(8)])
    before = sorted(tmp_path.iterdir())
    scorer = {"pm": preference_model(model, tmp_path.parent / "pm")} if name == "rl" else {}
    with pytest.raises(CaiError) as refused:
        stage(name)(source, tmp_path / "out", model=model, device="cpu", **scorer)
    assert refused.value.code == "not-enough-memory"
    assert sorted(path for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == before


def preference_model(model: Path, out: Path) -> str:
    from cai_cli.models.loading import load_reward_model, load_tokenizer

    load_reward_model(model, new_head_seed=0).save_pretrained(out)
    load_tokenizer(model).save_pretrained(out)
    return str(out)


def test_a_trainer_says_what_it_will_hold_only_where_memory_is_not_plenty(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = replace(GPU, device="cpu", dtype="float32")
    memory_check.check_memory("sft", model, training, WORK)
    assert capsys.readouterr().err == ""
    peak = on(1e12, shape_of_dir(model), training).memory.peak
    monkeypatch.setattr(memory_check, "this_device", lambda _: DeviceMemory("of RAM", 1.2 * peak, on_cpu=True))
    memory_check.check_memory("sft", model, training, WORK)
    assert "sft: memory" in capsys.readouterr().err
    monkeypatch.setattr(memory_check, "this_device", lambda _: DeviceMemory("of RAM", 0.9 * peak, on_cpu=True))
    memory_check.check_memory("sft", model, training, WORK)
    assert "warning" in capsys.readouterr().err
