"""The decoding step in compiled calls against the model's own `forward`, and where it cannot be compiled."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_models import engine, family_config, generation_requests, replies

from cai_cli.engines.base import Sampling
from cai_cli.engines.local import decode_kernels, decode_step, prefix_cache
from cai_cli.engines.local.decode_kernels import Attention

SHARED = tuple(range(3, 24))  # more than one vector of columns, and not a multiple of it


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    decode_kernels.library.cache_clear()
    yield
    decode_kernels.library.cache_clear()


def small_model(family: str, head_dim: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(num_hidden_layers=2) if family == "llama" else family_config(family, 64)
    config.update({"vocab_size": 64, "hidden_size": 64, "intermediate_size": 80, "initializer_range": 0.2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    assert prefix_cache.enable_prefix_cache(model)
    return model


@pytest.mark.parametrize("start", [(), SHARED])
@pytest.mark.parametrize("head_dim", [16, 24, 80])
@pytest.mark.parametrize("family", sorted(decode_step.MODEL_TYPES))
def test_a_step_gives_the_logits_of_the_models_own_forward(
    family: str, head_dim: int, start: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(family, head_dim)
    rows = [start + tuple(range(3, 3 + count)) for count in (1, 15, 40)]
    caches = [prefix_cache.PrefixCache(model, start, 40)]
    monkeypatch.setattr(prefix_cache, "decode_step", lambda model: None)
    caches.append(prefix_cache.PrefixCache(model, start, 40))
    assert caches[0].quick_step is not None
    assert caches[1].quick_step is None
    with torch.inference_mode():
        first, *_ = (torch.cat(list(cache.add(rows, [1] * 3))) for cache in caches)
        tokens = first.argmax(-1)
        for _ in range(36):  # past the end of a vector, and past the sliding windows
            quick, plain = (cache.step(tokens) for cache in caches)
            assert torch.allclose(quick, plain, atol=1e-4)
            tokens = plain.argmax(-1)


def attention_of_rows(count: int, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention and the norms of the first `count` of seven rows of unlike lengths."""
    heads, key_heads, size, columns, shared = 6, 2, 24, 64, 21
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "query": (7, heads * size),
            "key": (7, key_heads * size),
            "value": (7, key_heads * size),
            "cosines": (7, size),
            "sines": (7, size),
            "keys": (7, key_heads, size, columns),
            "values": (7, key_heads, columns, size),
            "prefix_keys": (key_heads, size, 32),
            "prefix_values": (key_heads, 32, size),
        }.items()
    }
    out, lengths = torch.empty(count, heads * size), torch.tensor([64, 1, 16, 17, 40, 15, 63])
    longest = 32 + 64 + decode_kernels.LANES  # of the buffers, whatever the rows need
    scratch = torch.empty(threads * heads // key_heads * (2 * size + longest))
    numbers = {"rows": count, "heads": heads, "key_heads": key_heads, "size": size, "rotary": size, "scaling": 0.2}
    numbers |= {"columns": columns, "shared": shared, "prefix_columns": 32, "longest": longest, "threads": threads}
    pointers = made | {"out": out, "lengths": lengths, "scratch": scratch}
    call = Attention(**{name: tensor.data_ptr() for name, tensor in pointers.items()}, **numbers)
    library = decode_kernels.library()
    library.attend(ctypes.byref(call))
    normed, weight = torch.empty_like(made["query"][:count]), made["query"][0]
    hidden = made["query"][:count].clone()
    library.add_norm(
        *(t.data_ptr() for t in (hidden, out, weight)), 1e-5, normed.data_ptr(), count, heads * size, threads
    )
    library.gate(normed.data_ptr(), hidden.data_ptr(), count, heads * size, threads)
    return out, normed


def test_the_compiled_operations_give_a_row_the_same_bits_beside_any_rows_and_with_any_number_of_threads() -> None:
    together = attention_of_rows(7, threads=1)
    for count, threads in ((1, 1), (3, 1), (7, 2)):
        for some, every in zip(attention_of_rows(count, threads), together, strict=True):
            assert torch.isfinite(some).all()
            assert torch.equal(some, every[:count])


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_model_decodes_in_torch_and_writes_the_same_text() -> None:
    assert decode_kernels.library() is None
    assert decode_step.decode_step(engine("llama").model) is None
    in_torch = replies("llama", None, generation_requests(6), Sampling(12, temperature=0))
    decode_kernels.library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CC")
        assert decode_step.decode_step(engine("llama").model) is not None
        assert replies("llama", None, generation_requests(6), Sampling(12, temperature=0)) == in_torch


def test_the_operations_are_compiled_once_and_bring_no_second_openmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    made = decode_kernels._compiled("cc")
    written = made.stat().st_mtime_ns
    assert decode_kernels._compiled("cc") == made
    assert made.stat().st_mtime_ns == written
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    assert b"libgomp.so" not in made.read_bytes()
