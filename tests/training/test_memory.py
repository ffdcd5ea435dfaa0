"""The plan of memory, held to the allocator while real models train, and to torch's own AdamW."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from cai_cli.training.activations import ModelShape, shape_of
from cai_cli.training.config import TrainingConfig
from cai_cli.training.memory import MemoryPlan, Sharding, Workload, plan

ROWS, LENGTH = 4, 128
CPU = TrainingConfig(
    batch_size=ROWS, gradient_accumulation=2, learning_rate=1e-3, save_steps=1, seed=0, device="cpu", dtype="float32"
)
MIXED, CHECKPOINTED = replace(CPU, dtype="bfloat16"), replace(CPU, gradient_checkpointing="on")
LORA = replace(CPU, lora_rank=8)
SETTINGS = {
    "float32": CPU,
    "bfloat16": MIXED,
    "checkpointed": CHECKPOINTED,
    "checkpointed bfloat16": replace(CHECKPOINTED, dtype="bfloat16"),
    "lora": LORA,
    "lora on bfloat16": replace(LORA, dtype="bfloat16", weights="bfloat16"),
    "lora on bfloat16, checkpointed": replace(
        LORA, dtype="bfloat16", weights="bfloat16", gradient_checkpointing="on"
    ),
}


def family(name: str) -> Any:
    """The config of a small model with the structure of a family."""
    from transformers import AutoConfig

    kind, _, feature = name.partition(", ")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 512, "head_dim": 16, "max_position_embeddings": 256}
    sizes |= {"tie_word_embeddings": feature == "tied", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"grouped queries": {"num_key_value_heads": 1}, "large vocabulary": {"vocab_size": 8192}}
    return AutoConfig.for_model(kind, **sizes | more.get(feature, {}))


def model_of(config: Any, training: TrainingConfig) -> Any:
    """A random model as the trainers prepare it, with TRL's head as it runs on a CPU."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from cai_cli.training import cpu_logprobs

    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, training.trained_dtype))
    add_fused_lm_head(model)
    if training.device == "cpu":
        cpu_logprobs._patch(model, 1.0)
    adapters = training.peft_config()
    model = get_peft_model(model, adapters) if adapters else model
    model.train()
    if training.checkpoints_activations:
        model.gradient_checkpointing_enable()
        if adapters:
            model.enable_input_require_grads()
    return model.to(training.device)


def forward_and_backward(model: Any, training: TrainingConfig) -> None:
    import torch

    ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device=training.device)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # as in every batch with rows of several lengths
    with training.autocast():
        loss = -model(ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs.sum()
    loss.backward()


def measured(model: Any, training: TrainingConfig) -> float:
    """The most bytes that the CPU's allocator held in a pass, beside what it held before."""
    from torch.profiler import ProfilerActivity, profile

    forward_and_backward(model, training)  # gradients exist from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        forward_and_backward(model, training)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


FAMILIES = ("llama", "llama, grouped queries", "llama, large vocabulary", "qwen2, tied", "qwen3", "gemma2, tied")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_within_15_percent_of_what_the_allocator_holds(name: str, setting: str) -> None:
    config, training = family(name), SETTINGS[setting]
    estimate = plan(shape_of(config), training, Workload(LENGTH, scored=LENGTH), Sharding()).activations
    real = measured(model_of(config, training), training)
    print(name, setting, estimate/1e6, real/1e6, estimate/real)
    assert estimate == pytest.approx(real, rel=0.15)
