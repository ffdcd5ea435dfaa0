"""LoRA on models with layers that take no adapters, and on models that also take images."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model_dir
from transformers import AutoTokenizer

from cai_cli.common.errors import CaiError
from cai_cli.models.loading import load_causal_lm, load_reward_model
from cai_cli.training.config import TrainingConfig

LORA = TrainingConfig(1, 1, 1e-3, 1, 0, "cpu", lora_rank=2)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def saved(model: Any, tokenizer: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir(tmp_path / "tiny"))


@pytest.fixture
def gemma(tokenizer: Any, tmp_path: Path) -> Path:
    text = SMALL | {"vocab_size": len(tokenizer), "head_dim": 8, "layer_types": ["full_attention"] * 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=3, **{"eos_token_id": 2}
    )
    return saved(transformers.Gemma3ForConditionalGeneration(config), tokenizer, tmp_path / "gemma")


@pytest.fixture
def falcon(tokenizer: Any, tmp_path: Path) -> Path:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    config = transformers.FalconH1Config(vocab_size=len(tokenizer), **SMALL, **mamba)
    return saved(transformers.FalconH1ForCausalLM(config), tokenizer, tmp_path / "falcon")


def adapted(model: Any, *, classifier: bool = False) -> set[str]:
    """The names of the layers with adapters."""
    from peft import get_peft_model

    wrapped = get_peft_model(model, LORA.peft_config(model, classifier=classifier))
    return {name.partition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize("classifier", [False, True])
def test_only_the_language_model_of_a_model_with_vision_is_trained(gemma: Path, classifier: bool) -> None:
    model = load_reward_model(gemma, new_head_seed=0) if classifier else load_causal_lm(gemma)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all("vision" in name or "multi_modal" in name for name in frozen)
    assert any("embed_tokens" in name for name in trained)
    assert not any("vision" in name for name in trained)
    layers = adapted(model, classifier=classifier)
    assert any("language_model.layers.1.self_attn.q_proj" in name for name in layers)
    assert not any("vision" in name for name in layers)


def test_mamba_layers_that_peft_refuses_get_no_adapters(falcon: Path) -> None:
    layers = adapted(load_causal_lm(falcon))
    assert any("mamba.in_proj" in name for name in layers)
    assert not any("out_proj" in name for name in layers)


def test_a_kind_without_a_classifier_is_refused_by_name(falcon: Path) -> None:
    with pytest.raises(CaiError, match="falcon_h1") as caught:
        load_reward_model(falcon, new_head_seed=0)
    assert caught.value.code == "wrong-model-kind"
    assert torch.is_tensor(load_causal_lm(falcon).lm_head.weight)
