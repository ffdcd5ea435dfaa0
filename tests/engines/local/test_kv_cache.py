"""Kinds of models that transformers' own cache runs: a row's text is the same alone, in a batch, and without any cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model_dir
from transformers import AutoTokenizer

from cai_cli.engines.base import LogprobRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.models.loading import load_causal_lm

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2, **IDS}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
GATED = {
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA2 = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_chunk_size": 16,
}  # fmt: skip
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 64}
EXPERTS = {
    "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "output_router_logits": True,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mamba": SMALL | {"state_size": 8},
    "Bloom": SMALL | {"n_layer": 2, "n_head": 4},
    "Qwen3_5Text": SMALL | HEADS | GATED,
    "FalconH1": SMALL | HEADS | MAMBA2,
    "Lfm2": SMALL | HEADS | CONVOLUTION,
    "Qwen3Moe": SMALL | HEADS | EXPERTS,
}


def saved(kind: str, path: Path) -> Path:
    """A small random model of a kind, with the tokenizer of `tiny`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(path.with_name("tiny")))
    torch.manual_seed(0)
    if kind == "Mistral3":
        text = SMALL | HEADS | {"model_type": "mistral", "head_dim": 8, "vocab_size": len(tokenizer)}
        config = transformers.Mistral3Config(
            text_config=text, vision_config=VISION | {"model_type": "pixtral"}, image_token_index=3
        )
        model: Any = transformers.Mistral3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **KINDS[kind])
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The answer without a cache."""
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < count and new[-1:] != [2]:
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("kind", [*KINDS, "Mistral3"])
def test_every_kind_of_model_gives_a_row_the_same_text_in_any_batch(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / kind)
    prompts = [[5 + (7 * row + place) % 400 for place in range(3 + 5 * row)] for row in range(4)]
    sampling = Sampling(temperature=0.0, max_new_tokens=6)
    together, alone = (LocalEngine(str(path), batch_size=size, device="cpu", dtype="float32") for size in (4, 1))
    answers, _ = together.generate_ids(prompts, range(4), sampling)
    assert answers == alone.generate_ids(prompts, range(4), sampling)[0]
    model = load_causal_lm(path)
    assert answers == [greedy(model, prompt, 6) for prompt in prompts]
    requests = [LogprobRequest(text, ("Yes", "No")) for text in ("a", "consider the following conversation")]
    for one, other in zip(together.option_logprobs(requests), alone.option_logprobs(requests), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
