"""The decoding step of fixed shapes, which CUDA records as graphs, run on the CPU without recording."""

import pytest
from local_models import generation_requests, replies

from cai_cli.engines.base import Sampling
from cai_cli.engines.local import prefix_cache
from cai_cli.engines.local.static_step import StaticSteps


@pytest.mark.parametrize("family", sorted(prefix_cache.MODEL_TYPES))
def test_steps_of_fixed_shapes_write_the_same_text_while_rows_come_and_go(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, sampling = generation_requests(9), Sampling(20)
    expected = replies(family, 4, wanted, sampling)
    shapes: set[tuple[int, int]] = set()
    forward = StaticSteps._forward

    def watched(steps: StaticSteps, rows: int, columns: int) -> object:
        shapes.add((rows, columns))
        return forward(steps, rows, columns)

    def static_cache(*given: object) -> prefix_cache.PrefixCache:
        cache = made(*given)
        cache.quick_step, cache.is_static = None, True
        return cache

    made = prefix_cache.PrefixCache
    monkeypatch.setattr(StaticSteps, "_forward", watched)
    monkeypatch.setattr("cai_cli.engines.local.engine.PrefixCache", static_cache)
    assert replies(family, 4, wanted, sampling) == expected
    assert 1 <= len(shapes) <= 8
