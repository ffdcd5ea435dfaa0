"""Processes batches concurrently and yields their results in input order; no result is lost when a run stops.

A slow batch holds back only the batches behind it, and only up to a bound, which limits both memory and the work that
a kill costs.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cai_cli.common.errors import CaiError

B = TypeVar("B")
R = TypeVar("R")
AHEAD = 8  # batches per worker that may be started before the first of them is finished


def in_order(
    batches: Iterable[B], work: Callable[[B], R], workers: int, out_of_order: list[R], cancel: Callable[[], None]
) -> Generator[list[R], None, None]:
    """Yield the results of all batches in input order, in groups of those that are ready.

    After an error no further batch is started. A CaiError waits for the batches in progress; any other exception, such
    as an interrupt, calls `cancel` first.

    Args:
        batches: The batches. They are taken from the iterator in this thread, a bounded number ahead.
        work: Processes one batch.
        workers: How many batches are in progress at once. With 1, `work` is called in this thread.
        out_of_order: Receives the results that were finished behind a batch that failed.
        cancel: Makes the batches in progress return.
    """
    if workers == 1:
        for batch in batches:
            yield [work(batch)]
        return
    pool = ThreadPoolExecutor(workers)
    started: deque[Future[R]] = deque()
    try:
        for batch in batches:
            started.append(pool.submit(work, batch))
            if started[0].done() or len(started) >= AHEAD * workers:
                yield _take_finished(started)
        while started:
            yield _take_finished(started)
    except CaiError:
        raise
    except BaseException:
        cancel()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        out_of_order += [future.result() for future in started if not future.cancelled() and not future.exception()]


def _take_finished(started: deque[Future[R]]) -> list[R]:
    """Wait for the first batch; take it and the finished ones directly behind it off the queue."""
    group = [started[0].result()]
    started.popleft()
    while started and started[0].done() and not started[0].exception():
        group.append(started.popleft().result())
    return group
