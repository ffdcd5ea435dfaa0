"""Batches come back in order, and no finished batch is lost."""

import time

from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import CaiError
from cai_cli.runtime.ordered_map import in_order


@given(st.integers(0, 40), st.integers(1, 5), st.none() | st.integers(0, 39))
def test_batches_come_back_in_order_and_no_finished_one_is_lost(count: int, workers: int, failing: int | None) -> None:
    begun: list[int] = []

    def work(window: int) -> int:
        begun.append(window)
        time.sleep(0.0002 * (window * 7 % 5))
        if window == failing:
            raise CaiError("stop")
        return window

    out_of_order: list[int] = []
    given_up: list[bool] = []
    got: list[int] = []
    try:
        for group in in_order(range(count), work, workers, out_of_order, lambda: given_up.append(True)):
            got += group
    except CaiError:
        assert sorted([*got, *out_of_order, failing]) == sorted(begun)  # type: ignore[type-var]
        assert got == list(range(len(got)))
        assert failing not in got
    else:
        assert got == list(range(count))
        assert not out_of_order
    assert not given_up
