"""The client of a server: requests in work at once, and which model answered."""

import threading
import time

import pytest
from loopback import Request, completion, engine, http

from cai_cli.common.errors import CaiError
from cai_cli.engines.base import Completion, GenerationRequest, Sampling


def test_answers_are_in_the_order_of_the_requests_and_concurrency_is_bounded() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def slow(request: Request) -> bytes:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02 * (request.number % 3))
        with lock:
            now[0] -= 1
        return http(completion(request, request.asked))

    asks = [GenerationRequest(str(i), i) for i in range(20)]
    with engine(slow, concurrency=4) as (e, _):
        replies = e.generate(asks, Sampling(9))
    assert [r.text for r in replies if isinstance(r, Completion)] == [str(i) for i in range(20)]
    assert most == [4]


@pytest.mark.parametrize("answered", ["m", "m-2026-01-01", None, ""])
def test_a_dated_version_of_the_model_is_the_model(answered: str | None) -> None:
    with engine(lambda r: http(completion(r, model=answered))) as (e, _):
        assert isinstance(e.generate([GenerationRequest("a", 1)], Sampling(9))[0], Completion)


@pytest.mark.parametrize("answered", ["n", "mm", "M", "x/m"])
def test_another_model_is_not(answered: str) -> None:
    with engine(lambda r: http(completion(r, model=answered))) as (e, _), pytest.raises(CaiError) as wrong:
        e.generate([GenerationRequest("a", 1)], Sampling(9))
    assert wrong.value.code == "wrong-answer"
