"""Rows with a common prefix are grouped, and the prefix is run once."""

from hypothesis import given
from hypothesis import strategies as st
from local_models import chat, ids, model_dir, prompt_ids

from cai_cli.engines.base import GenerationRequest, Sampling
from cai_cli.engines.local import prefix_cache
from cai_cli.engines.local.engine import LocalEngine


@given(st.lists(ids, unique=True, max_size=12), st.integers(0, 60))
def test_groups_hold_every_row_once_and_cost_no_more_than_one_group(rows: list[tuple[int, ...]], more: int) -> None:
    rows = [(9,) * more + row for row in rows]
    found = prefix_cache.prefix_groups(rows)
    assert sorted(row for group in found for row in group) == sorted(rows)

    def cost(group: list[tuple[int, ...]]) -> int:
        start = min(prefix_cache.common_prefix_length(min(group), max(group)), min(map(len, group)) - 1)
        return prefix_cache.MIN_SHARED_TOKENS + start + sum(len(row) - start for row in group)

    assert sum(map(cost, found)) <= (cost(rows) if rows else 0)


def test_thousands_of_nested_prefixes_are_grouped() -> None:
    rows = [(1,) * n + (2,) for n in range(1, 2000, 2)]
    found = prefix_cache.prefix_groups(rows)
    assert sorted(row for group in found for row in group) == sorted(rows)


def test_rows_with_two_long_prefixes_are_two_groups() -> None:
    rows = [(start,) * 40 + (i, i) for start in (3, 4) for i in (5, 6, 7)]
    assert prefix_cache.prefix_groups(rows) == [rows[:3], rows[3:]]


def test_a_shared_prefix_and_equal_prompts_are_run_once() -> None:
    fresh = LocalEngine(str(model_dir()), batch_size=None, device="cpu", dtype="float32")
    run: list[int] = []
    fresh.model.register_forward_pre_hook(
        lambda _, __, inputs: run.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    examples = "Please choose the response that is the most helpful, honest, and harmless. " * 3
    wanted = [GenerationRequest(chat(examples + last), seed) for last in ("Yes", "No") for seed in range(4)]
    assert len(fresh.generate(wanted, Sampling(1))) == 8
    assert sum(run) < 1.5 * len(prompt_ids(fresh, wanted[0]))
