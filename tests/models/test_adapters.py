"""Merging of LoRA adapters: in float32, whatever the precision of the weights under them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_dir

from cai_cli.models.adapters import merged
from cai_cli.models.loading import load_causal_lm, load_reward_model
from cai_cli.training.config import TrainingConfig

CONFIG = TrainingConfig(1, 1, 1e-3, 1, 0, "cpu", lora_rank=4)


def adapted(model: Any, classifier: bool = False) -> Any:
    """The model with adapters that change it by less than the rounding of bfloat16."""
    from peft import get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model, CONFIG.peft_config(classifier=classifier))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return wrapped


def test_adapters_on_bfloat16_weights_are_merged_into_the_original_ones(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path / "tiny")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    exact = adapted(load_causal_lm(base)).eval()
    with torch.inference_mode():
        expected = exact(input_ids=ids).logits
        plain = load_causal_lm(base)(input_ids=ids).logits
    rounded = adapted(load_causal_lm(base, "bfloat16"))
    assert rounded.get_base_model().dtype == torch.bfloat16
    model = merged(rounded)
    assert model.dtype == torch.float32
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    # Merged in bfloat16, the weights keep little of the adapters.
    worse = adapted(load_causal_lm(base, "bfloat16")).merge_and_unload().float()
    with torch.inference_mode():
        assert (worse(input_ids=ids).logits - expected).abs().max() > (expected - plain).abs().max() / 2


def test_the_trained_head_of_a_preference_model_is_kept(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path / "tiny")
    wrapped = adapted(load_reward_model(base, "bfloat16", new_head_seed=3), classifier=True)
    head = wrapped.get_base_model().score
    with torch.no_grad():
        trained = head.modules_to_save["default"].weight
        trained.add_(1.0)
    assert trained.dtype == torch.float32  # so that small steps are not rounded away
    model = merged(wrapped)
    torch.testing.assert_close(model.score.weight, trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_preference_model_gives_scores_in_float32(tmp_path: Path, dtype: str) -> None:
    model = load_reward_model(tiny_model_dir(tmp_path / "tiny"), dtype, new_head_seed=3)
    assert (model.dtype, model.score.weight.dtype) == (getattr(torch, dtype), torch.float32)
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
