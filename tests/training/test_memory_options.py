"""The options that decide how much memory training takes, in every trainer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import largest_difference, manifest_of, preference, revision, rows_in, stage, weights, write_rows
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.training import options
from cai_cli.training.config import TrainingConfig

TRAINERS = ("sft", "train-pm", "rl")
QUICK: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "eval_share": 0.0,
    "batch_size": 4,
    "gradient_accumulation": 1,
}
CONFIG = TrainingConfig(4, 1, 1e-3, 5, 0, "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model_dir(folder / "tiny")
    load_reward_model(model, new_head_seed=0).save_pretrained(folder / "pm")
    load_tokenizer(model).save_pretrained(folder / "pm")
    return {"model": str(model), "pm": str(folder / "pm")}


def train(name: str, folder: Path, models: dict[str, str], **run: Any) -> list[dict[str, Any]]:
    """Train for three steps; returns the rows of the metrics after the first."""
    if name == "rl":
        file = write_rows(folder / "rows.jsonl", [{"prompt": f"question {i}"} for i in range(8)])
        given = {"steps": 3, "prompts_per_step": 2, "max_new_tokens": 6, "held_out": 2, "learning_rate": 1e-2} | models
    else:
        make = revision if name == "sft" else preference
        file = write_rows(folder / "rows.jsonl", [make(i) for i in range(12)])
        given = QUICK | {"model": models["model"]}
    stage(name)(file, folder / "out", **given | run)
    return rows_in(folder / "out/metrics.jsonl")[1:]


@pytest.mark.parametrize(
    ("device", "lora", "given", "trained", "frozen"),
    [
        ("cpu", False, "auto", "float32", "float32"),
        ("cpu", True, "auto", "float32", "float32"),
        ("cuda", False, "auto", "float32", "bfloat16"),
        ("cuda", True, "auto", "bfloat16", "bfloat16"),
        ("cuda", True, "float32", "float32", "float32"),
        ("cpu", True, "bfloat16", "bfloat16", "bfloat16"),
        ("cuda", False, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_weights_that_are_not_trained_are_bfloat16_on_a_gpu(
    device: str, lora: bool, given: str, trained: str, frozen: str
) -> None:
    config = replace(CONFIG, device=device, weights=given, lora_rank=4 if lora else None)
    assert (config.trained_dtype, config.frozen_dtype) == (trained, frozen)
    assert config.reference_options == (None if trained == frozen else {"dtype": frozen})


@pytest.mark.parametrize("name", [*TRAINERS, "dpo"])
def test_every_trainer_computes_in_bfloat16_where_that_is_requested_and_writes_float32(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: set[torch.dtype] = set()
    silu = torch.nn.functional.silu

    def seen(values: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            computed.add(values.dtype)
        return silu(values, *more, **named)

    monkeypatch.setattr(torch.nn.functional, "silu", seen)
    train(name, tmp_path, models, dtype="bfloat16")
    assert computed == {torch.bfloat16}
    assert manifest_of(tmp_path / "out")["provenance"]["settings"]["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


def test_a_precision_in_which_no_trainer_computes_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype") as error:
        train("train-pm", tmp_path, models, dtype="float16")
    assert error.value.code == "invalid-option"


def test_activations_are_computed_again_on_a_gpu_unless_said() -> None:
    wanted = {("cpu", "auto"): False, ("cuda", "auto"): True, ("cpu", "on"): True, ("cuda", "off"): False}
    for (device, given), expected in wanted.items():
        config = replace(CONFIG, device=device, gradient_checkpointing=given)
        assert config.arguments(Path("out.partial"))["activation_checkpointing"] is expected


def test_a_trainer_gets_no_deprecated_option(tmp_path: Path) -> None:
    from trl import SFTConfig

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = SFTConfig(**replace(CONFIG, gradient_checkpointing="on").arguments(tmp_path))
    assert made.gradient_checkpointing  # TRL still reads the old name
    assert [str(one.message) for one in found if issubclass(one.category, FutureWarning)] == []


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The bytes of each tensor that autograd keeps for a backward pass."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_activations_take_less_memory_and_train_the_same_model(
    models: dict[str, str], tmp_path: Path, lora: bool
) -> None:
    used, losses = {}, {}
    for choice in ("off", "on"):
        (tmp_path / choice).mkdir()
        with saved_bytes() as kept:
            rows = train("sft", tmp_path / choice, models, gradient_checkpointing=choice, lora=lora)
        used[choice], losses[choice] = sum(kept), [row["loss"] for row in rows]
    assert used["on"] < 0.75 * used["off"]  # of two layers; the logits are kept in both
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-6)
    assert largest_difference(tmp_path / "on/out", tmp_path / "off/out") < 1e-5


@pytest.mark.parametrize("name", TRAINERS)
def test_a_base_in_bfloat16_under_adapters_trains_and_the_output_is_float32(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    loaded: list[torch.dtype] = []
    plain = PeftModel.train

    def seen(self: Any, mode: bool = True) -> Any:
        loaded.append(self.get_base_model().dtype)
        return plain(self, mode)

    monkeypatch.setattr(PeftModel, "train", seen)
    for choice in ("float32", "bfloat16"):
        (tmp_path / choice).mkdir()
        train(name, tmp_path / choice, models, weights=choice, lora=True)
        assert set(loaded) == {getattr(torch, choice)}
        loaded.clear()
        assert manifest_of(tmp_path / choice / "out")["provenance"]["settings"]["weights"] == choice
    results = {choice: weights(tmp_path / choice / "out") for choice in ("float32", "bfloat16")}
    assert {tensor.dtype for tensor in results["bfloat16"].values()} == {torch.float32}
    start = weights(Path(models["model"]))
    if name != "rl":  # whose replies differ after the first step
        for layer, before in start.items():
            moved, same = (results[choice][layer] - before for choice in ("float32", "bfloat16"))
            assert (moved - same).norm() <= 0.25 * moved.norm() + 1e-6, layer
    assert max(float((results["bfloat16"][layer] - before).abs().max()) for layer, before in start.items()) > 1e-4


def test_all_weights_train_in_bfloat16_where_that_is_said(models: dict[str, str], tmp_path: Path) -> None:
    rows = train("sft", tmp_path, models, weights="bfloat16")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_reference_model_may_have_another_precision_than_the_policy(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer import rloo_trainer

    made: list[torch.dtype] = []
    plain = rloo_trainer.create_model_from_path

    def seen(*arguments: Any, **given: Any) -> Any:
        model = plain(*arguments, **given)
        made.append(model.dtype)
        return model

    monkeypatch.setattr(rloo_trainer, "create_model_from_path", seen)
    monkeypatch.setattr(TrainingConfig, "frozen_dtype", "bfloat16")  # as on a GPU
    rows = train("rl", tmp_path, models)
    assert made == [torch.bfloat16]
    assert abs(rows[0]["kl"]) < 0.05  # of the start model with itself, up to the rounding
    settings = manifest_of(tmp_path / "out")["provenance"]["settings"]
    assert (settings["weights"], settings["reference_weights"], settings["pm_dtype"]) == (
        "float32",
        "bfloat16",
        "float32",
    )


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"quantize": "4bit"}, "option-conflict"),  # without --lora
        ({"quantize": "4bit", "lora": True}, "missing-dependency"),
        ({"optimizer": "adamw-8bit"}, "missing-dependency"),
        ({"liger": True}, "missing-dependency"),
        ({"attention": "flash_attention_2"}, "missing-dependency"),
    ],
)
@pytest.mark.parametrize("name", TRAINERS)
def test_an_option_whose_package_is_missing_is_refused_before_anything_is_loaded(
    name: str, given: dict[str, Any], code: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optional = ("bitsandbytes", "liger_kernel", "flash_attn")
    monkeypatch.setattr(options, "find_spec", lambda package: None if package in optional else find_spec(package))
    with pytest.raises(UsageError) as error:
        train(name, tmp_path, models, **given)
    assert error.value.code == code


@pytest.mark.parametrize(
    "given", [{"liger": True}, {"attention": "flash_attention_2"}, {"optimizer": "paged-adamw-8bit"}]
)
def test_an_option_for_a_gpu_is_refused_on_a_cpu(
    given: dict[str, Any], models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda _: object())
    with pytest.raises(CaiError) as error:
        train("sft", tmp_path, models, device="cpu", **given)
    assert error.value.code == "no-device"


def test_the_attention_that_is_chosen_is_used(models: dict[str, str]) -> None:
    for choice in ("eager", "sdpa"):
        model = load_causal_lm(Path(models["model"]), **replace(CONFIG, attention=choice).loading)
        assert model.config._attn_implementation == choice


def test_adapters_on_4_bit_weights_are_merged_into_the_original_ones(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")  # the extra `quantize`
    model = str(tiny_model_dir(tmp_path / "tiny", hidden_size=128))  # of which blocks of 64 weights can be quantised
    rows = train("sft", tmp_path, {"model": model}, lora=True, quantize="4bit", lora_rank=4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = weights(Path(model)), weights(tmp_path / "out")
    for layer, start in before.items():
        changed = after[layer] - start
        # Adapters change a matrix by one of their rank; a rounding to 4 bits would change every direction.
        if changed.abs().max() > 0:
            assert torch.linalg.matrix_rank(changed, rtol=1e-3) <= 4
    assert sum(bool((after[layer] - start).abs().max() > 0) for layer, start in before.items()) == 14


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"pm_device": "gpu"}, "invalid-option"),
        ({"pm_device": "cuda:1", "pm_url": "http://localhost:1/classify"}, "option-conflict"),
    ],
)
def test_the_preference_model_stands_on_a_device_or_behind_an_address(given: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as error:
        RlConfig.build({"input": "in.jsonl", "output": "out", "pm": "pm", **given})
    assert error.value.code == code
