"""The memory of attention does not grow with the product of heads, queries and keys."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cai_cli.engines.local import packed_attention, prefix_cache

LONG = 1500
HEADS = 32


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=4 * HEADS,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        max_position_embeddings=2 * LONG,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = LlamaForCausalLM(config).eval()
    packed = LlamaForCausalLM(copy.deepcopy(config)).eval()
    packed.load_state_dict(plain.state_dict())
    assert prefix_cache.enable_prefix_cache(packed)
    return plain, packed


@pytest.mark.parametrize("shared", [0, 1000])
@pytest.mark.parametrize("device_budget", [512, 16384])
def test_the_scores_of_a_long_row_take_bounded_memory_and_its_logits_are_those_of_one_plain_pass(
    models: tuple[Any, Any], shared: int, device_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = models
    monkeypatch.setattr(prefix_cache.PrefixCache, "_budget", device_budget)
    generator = torch.Generator().manual_seed(shared)
    row = tuple(int(i) for i in torch.randint(3, 60, (LONG,), generator=generator))
    with torch.inference_mode():
        with LargestTensor() as largest:
            (logits,) = prefix_cache.PrefixCache(packed, row[:shared], 8).add([row], [2])
        assert torch.allclose(logits, plain(torch.tensor([row])).logits[0, -2:], atol=1e-4)
    # All at once a pass would have 32 * 512 * 1500 scores, or 32 * 1500 * 1500.
    assert largest.elements <= packed_attention.MAX_SCORES["cpu"]


def test_a_row_has_the_same_logits_beside_any_rows_though_its_queries_are_taken_in_other_pieces(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = models
    monkeypatch.setitem(packed_attention.MAX_SCORES, "cpu", 20_000)  # a few queries at a time
    generator = torch.Generator().manual_seed(1)
    rows = [
        tuple(int(i) for i in torch.randint(3, 60, (length,), generator=generator)) for length in (40, 90, 91, 130, 300)
    ]
    with torch.inference_mode():
        together = list(prefix_cache.PrefixCache(packed, (), 8).add(rows, [3] * 5))
        for row, logits in zip(rows, together, strict=True):
            (alone,) = prefix_cache.PrefixCache(packed, (), 8).add([row], [3])
            assert torch.allclose(logits, alone, atol=1e-4)
