"""Several servers of one model: requests in turn, and away from a server that fails."""

from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, write_rows
from loopback import Loopback, Request, error, good, reset

from cai_cli.common.errors import CaiError
from cai_cli.engines import open_engine, openai_client, server_pool
from cai_cli.engines.base import Completion, GenerationRequest, Sampling, Server
from cai_cli.engines.server_pool import ServerPool

ASKS = [GenerationRequest(f"q{i}", i) for i in range(12)]


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "FIRST_REST", 0.001)
    monkeypatch.setattr(openai_client, "FIRST_REST", 0.001)


def answers(*servers: Loopback, **more: float) -> list[str]:
    engine = open_engine(
        "openai:m", batch_size=None, device="auto", dtype="auto", server=Server([s.url for s in servers], **more)  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        replies = engine.generate(ASKS, Sampling(9))
    finally:
        engine.close()
    return [reply.text for reply in replies if isinstance(reply, Completion)]


def test_requests_go_to_the_servers_in_turn_and_the_answers_are_those_of_one() -> None:
    with Loopback() as one, Loopback() as other, Loopback() as alone:
        assert answers(one, other) == answers(alone)
        assert len(one.requests) == len(other.requests) == 6


@pytest.mark.parametrize("broken", [reset, lambda _: error(503), lambda _: error(429)])
def test_a_server_that_fails_loses_its_requests_to_the_others(broken: object) -> None:
    with Loopback() as one, Loopback(broken) as other, Loopback() as alone:  # type: ignore[arg-type]
        assert answers(one, other) == answers(alone)
        assert len(one.requests) == 12


def test_a_server_that_comes_back_gets_requests_again() -> None:
    def once(request: Request) -> bytes:
        return error(503) if request.number == 1 else good(request)

    with Loopback() as one, Loopback(once) as other:
        assert len(answers(one, other, concurrency=1)) == 12
        assert len(other.requests) > 1


def test_the_run_ends_when_no_server_is_left_and_the_message_names_one() -> None:
    with Loopback(reset) as one, Loopback(reset) as other:
        with pytest.raises(CaiError) as gone:
            answers(one, other)
        assert gone.value.code == "server-unreachable"
        assert one.url in gone.value.message or other.url in gone.value.message


def test_a_wrong_key_at_one_server_ends_the_run() -> None:
    with Loopback() as one, Loopback(lambda _: error(401)) as other, pytest.raises(CaiError) as refused:
        answers(one, other)
    assert (refused.value.code, other.url in refused.value.message) == ("server-refused", True)
    assert "leave this server out" in str(refused.value.hint)


def test_requests_that_fail_together_count_as_one_failure() -> None:
    pool = ServerPool(["http://a"])
    turns = [pool.next(now=0.0) for _ in range(5)]
    for turn in turns:
        assert turn is not None
        pool.failed(turn, now=0.0)
    assert pool.fewest_failures == 1


def test_only_one_request_tries_a_server_that_has_failed() -> None:
    pool = ServerPool(["http://a"])
    first = pool.next(now=0.0)
    assert first is not None
    pool.failed(first, now=0.0)
    trial = pool.next(now=100.0)
    assert trial is not None
    assert pool.next(now=100.0) is None
    pool.answered(trial)
    assert pool.next(now=100.0) is not None


def test_several_addresses_change_no_row_and_stand_in_the_manifest(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", ({"prompt": f"q{i}"} for i in range(6)))
    words = ("sample", "prompts.jsonl", "--model", "openai:m")
    with Loopback() as one, Loopback() as other:
        assert cai(*words, "-o", "alone.jsonl", "--base-url", one.url).code == 0
        assert cai(*words, "-o", "both.jsonl", "--base-url", one.url, "--base-url", other.url).code == 0
    assert rows_in(tmp_path / "both.jsonl") == rows_in(tmp_path / "alone.jsonl")
    both, alone = (manifest_of(tmp_path / name) for name in ("both.jsonl", "alone.jsonl"))
    assert both["provenance"] == alone["provenance"]
    assert set(both["run"]["usage"]["base_url"].split(",")) == {one.url, other.url}


def test_a_run_file_takes_several_addresses_and_they_are_not_a_sweep(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", ({"prompt": f"q{i}"} for i in range(6)))
    with Loopback() as one, Loopback() as other:
        step = f'{{command: sample, input: prompts.jsonl, base-url: ["{one.url}", "{other.url}"]}}'
        (tmp_path / "run.yaml").write_text(f"name: r\nmodel: openai:m\nsteps:\n  samples: {step}\n")
        done = cai("run", "run.yaml", "--out", "out")
    assert done.code == 0, done.stderr
    assert len(rows_in(tmp_path / "out/samples.jsonl")) == 6
    assert one.requests
    assert other.requests


def test_a_server_at_its_limit_rests_for_as_long_as_it_asks_though_earlier_requests_are_answered() -> None:
    pool = ServerPool(["http://a"])
    turn = pool.next(now=0.0)
    assert turn
    turn.server.limit(now=1.0, wait=30.0)
    pool.answered(turn)
    assert pool.next(now=30.9) is None
    assert pool.next(now=31.0)


def test_a_limit_without_a_time_lasts_longer_after_each_window_and_not_after_each_refusal() -> None:
    (server,) = ServerPool(["http://a"]).servers
    for now in (0.0, 0.0, 0.0):
        server.limit(now, None)
    assert server.limited_until == server_pool.FIRST_REST
    server.limit(1.0, None)
    assert server.limited_until == 1.0 + 2 * server_pool.FIRST_REST
