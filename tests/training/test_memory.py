"""The plan of memory, held to the allocator while real models train, and to torch's own AdamW."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cai_cli.training.activations import ModelShape, shape_of
from cai_cli.training.config import TrainingConfig
from cai_cli.training.cpu_logprobs import use_unfused_head
from cai_cli.training.memory import GIB, MemoryPlan, Sharding, Workload, plan, static_plan

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
    "lora on bfloat16, checkpointed": replace(LORA, dtype="bfloat16", weights="bfloat16", gradient_checkpointing="on"),
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
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, training.trained_dtype))
    add_fused_lm_head(model)
    adapters = training.peft_config()
    model = get_peft_model(model, adapters) if adapters else model
    use_unfused_head(SimpleNamespace(model=model, args=SimpleNamespace(device=torch.device(training.device))))
    model.train()
    if training.checkpoints_activations:
        model.activation_checkpointing_enable()
        if adapters:
            model.enable_input_require_grads()
    return model.to(training.device)


def forward_and_backward(model: Any, training: TrainingConfig) -> None:
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device=training.device)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # as in every batch with rows of several lengths
    with training.autocast():
        loss = -model(ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs.sum()
    loss.backward()


def measured(model: Any, training: TrainingConfig, before: Callable[[], None] = lambda: None) -> float:
    """The most bytes that the CPU's allocator held in a second pass, beside what it held before it."""
    from torch.profiler import ProfilerActivity, profile

    forward_and_backward(model, training)  # gradients exist from now on
    before()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        forward_and_backward(model, training)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = (
    ("llama", "float32"),
    ("llama, grouped queries", "bfloat16"),
    ("llama, large vocabulary", "float32"),
    ("llama, large vocabulary", "lora on bfloat16, checkpointed"),
    ("qwen2, tied", "checkpointed"),
    ("qwen3", "lora"),
    ("qwen3", "checkpointed bfloat16"),
    ("gemma2, tied", "checkpointed"),
    ("gemma2, tied", "lora on bfloat16"),
)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_activations_are_within_15_percent_of_what_the_allocator_holds(name: str, setting: str) -> None:
    config, training = family(name), SETTINGS[setting]
    estimate = plan(shape_of(config), training, Workload(LENGTH, scored=LENGTH), Sharding())
    assert estimate.traced
    assert estimate.activations == pytest.approx(measured(model_of(config, training), training), rel=0.15)


def test_a_state_space_model_has_a_shape_without_a_kv_cache() -> None:
    from transformers import MambaConfig

    shape = shape_of(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))
    assert (shape.layers, shape.kv_values) == (2, 0)


@pytest.mark.parametrize("name", ["llama", "llama, large vocabulary"])
def test_without_accumulation_gradients_and_activations_share_memory(name: str) -> None:
    config, training = family(name), replace(CHECKPOINTED, gradient_accumulation=1)
    estimate = plan(shape_of(config), training, Workload(LENGTH, scored=LENGTH), Sharding())
    model = model_of(config, training)
    real = measured(model, training, before=lambda: model.zero_grad(set_to_none=True))
    assert estimate.gradients + estimate.activations == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("training", [CPU, LORA, replace(CPU, weights="bfloat16")])
@pytest.mark.parametrize("name", ["llama", "qwen2, tied"])
def test_weights_gradients_and_optimizer_are_those_of_torch(name: str, training: TrainingConfig) -> None:
    from torch.optim import AdamW

    config = family(name)
    model = model_of(config, training)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    forward_and_backward(model, training)
    optimizer.step()
    estimate = static_plan(shape_of(config), training, Workload(LENGTH, scored=LENGTH), Sharding())
    state = [value for each in optimizer.state.values() for name, value in each.items() if name != "step"]
    assert estimate.weights == size_of(model.parameters())
    assert estimate.gradients == size_of(p.grad for p in model.parameters() if p.grad is not None)
    assert estimate.optimizer == size_of(state)


def size_of(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_a_preference_model_has_a_scalar_head_instead_of_that_of_the_language_model() -> None:
    from transformers import AutoModelForSequenceClassification

    for name in ("llama", "qwen2, tied"):
        config = family(name)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
        assert shape_of(config).scorer == sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", ["checkpointed bfloat16", "lora on bfloat16", "lora on bfloat16, checkpointed"])
def test_the_peak_is_within_15_percent_of_what_a_gpu_allocates(setting: str) -> None:
    from torch.optim import AdamW

    config, training = family("llama, grouped queries"), replace(SETTINGS[setting], device="cuda")
    config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size = 1024, 3072, 256, 32768
    gc.collect()  # the models of earlier tests
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = model_of(config, training)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], fused=True)
    for _ in range(2):
        forward_and_backward(model, training)
        forward_and_backward(model, training)
        optimizer.step()
        optimizer.zero_grad()
    estimate = plan(shape_of(config), training, Workload(LENGTH, scored=LENGTH), Sharding())
    assert estimate.peak == pytest.approx(torch.cuda.max_memory_allocated() - held, rel=0.15)


# --- models of 8B -----------------------------------------------------------------------------------------------

GB, LENGTH_8B = 1e9, 1024
GPU = replace(CPU, device="cuda", dtype="auto")


@pytest.fixture(scope="module")
def llama_8b() -> ModelShape:
    from cai_cli.pipeline.memory_table import shapes

    return shapes()["8B"]


def test_full_training_takes_16_bytes_a_parameter(llama_8b: ModelShape) -> None:
    full = static_plan(llama_8b, GPU, Workload(LENGTH_8B, scored=LENGTH_8B), Sharding())
    assert full.weights + full.gradients + full.optimizer == 16 * 8_030_261_248


def test_adapters_on_float32_weights_without_checkpointing_take_75_gb_and_on_bfloat16_with_it_under_30(
    llama_8b: ModelShape,
) -> None:
    work = Workload(LENGTH_8B, scored=LENGTH_8B)
    lora = replace(GPU, lora_rank=16)
    before = plan(llama_8b, replace(lora, weights="float32", gradient_checkpointing="off"), work, Sharding())
    # 32 GB of weights, 14 of their copies in bfloat16 and 29 of other activations
    assert before.weights / GB == pytest.approx(32, rel=0.02)
    assert before.peak / GB == pytest.approx(75, rel=0.1)
    after = plan(llama_8b, lora, work, Sharding())
    assert after.weights / GB == pytest.approx(16.2, rel=0.02)
    assert after.peak < 30 * GB
    assert static_plan(llama_8b, replace(lora, quantize="4bit"), work, Sharding()).weights < 6 * GB


def test_processes_divide_what_their_stage_says(llama_8b: ModelShape) -> None:
    work = Workload(LENGTH_8B, scored=LENGTH_8B)
    alone = static_plan(llama_8b, GPU, work, Sharding())
    for stage, divided in enumerate([(), ("optimizer",), ("optimizer", "gradients"), (*OWN,)]):
        each = static_plan(llama_8b, GPU, work, Sharding(8, stage))
        for part in OWN:
            assert getattr(each, part) == getattr(alone, part) / (8 if part in divided else 1)
    assert static_plan(llama_8b, GPU, work, Sharding(8, 0)).communication == alone.gradients  # the buckets of DDP
    assert alone.communication == 0


OWN = ("weights", "gradients", "optimizer")


def test_at_the_peak_there_are_rollouts_or_gradients_and_activations() -> None:
    training = MemoryPlan(10.0, 2.0, 4.0, 5.0, 6.0, 1.0, 3.0, 0.0)
    assert training.peak == 10 + 4 + 1 + 3 + (2 + 5)
    assert "rollouts" not in training.parts
    sampling = replace(training, rollouts=8.0)
    assert sampling.peak == 10 + 4 + 1 + 3 + 8
    assert not sampling.parts.keys() & {"gradients", "activations"}


def test_rollouts_take_a_kv_cache_or_the_share_of_vllm(llama_8b: ModelShape) -> None:
    training = replace(GPU, lora_rank=16, max_steps=1)
    local = plan(llama_8b, training, Workload(512, scored=256, replies=64), Sharding(), 78 * GIB).rollouts
    cache = 64 * 512 * 131_072  # 128 KiB a token in bfloat16
    assert cache < local < 1.1 * cache
    by_vllm = Workload(512, scored=256, replies=64, engine_share=0.3)
    assert plan(llama_8b, training, by_vllm, Sharding(), 78 * GIB).rollouts == pytest.approx(0.3 * 78 * GIB)
    sharded = plan(llama_8b, training, Workload(512, scored=256, replies=64), Sharding(8, 3), 78 * GIB).rollouts
    assert sharded == local + 2 * llama_8b.parameters  # gathered, to sample
