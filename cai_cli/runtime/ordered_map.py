"""Windows of rows in work at once: begun in input order, handed back in input order, none lost when a run stops.

One slow row holds back only what comes after it, and that only up to a bound: memory, and what a kill costs, are
bounded with it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cai_cli.common.errors import CaiError

W = TypeVar("W")
R = TypeVar("R")
AHEAD = 8  # windows a worker that may be begun before the first of them is finished


def in_order(
    windows: Iterable[W], work: Callable[[W], R], workers: int, out_of_order: list[R], give_up: Callable[[], None]
) -> Generator[list[R], None, None]:
    """What `work` made of each window, in order and in groups, up to `workers` windows in work at once.

    On an error no further window is begun; a CaiError waits for those in work, anything else (an interrupt) calls
    `give_up` first, which must end them. What was finished behind the window that failed is put into `out_of_order`.
    """
    if workers == 1:
        for window in windows:
            yield [work(window)]
        return
    pool = ThreadPoolExecutor(workers)
    begun: deque[Future[R]] = deque()
    try:
        for window in windows:
            begun.append(pool.submit(work, window))
            if begun[0].done() or len(begun) >= AHEAD * workers:
                yield _finished(begun)
        while begun:
            yield _finished(begun)
    except CaiError:
        raise
    except BaseException:
        give_up()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        out_of_order += [future.result() for future in begun if not future.cancelled() and not future.exception()]


def _finished(begun: deque[Future[R]]) -> list[R]:
    """The first, waited for, and those after it that are finished too, taken off the queue."""
    group = [begun[0].result()]
    begun.popleft()
    while begun and begun[0].done() and not begun[0].exception():
        group.append(begun.popleft().result())
    return group
