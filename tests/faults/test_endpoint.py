"""A failing server: how often a request is sent, how long that takes, and what is left on disk."""

import json
import signal
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows
from loopback import Behaviour, Loopback, Request, completion, cut, error, good, hang, http, reset, trickle

from cai_cli.engines import openai_client, server_pool

KEY = "sk-canary-4242424242"
ROWS = 12
HTML = http(b"<!doctype html><html>Sign in</html>", Content_Type="text/html")


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve prompts, a key, and waits between attempts of hundredths of a second."""
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(ROWS)))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_client, "RETRIES", 2)
    monkeypatch.setattr(openai_client, "HOLD", 0.05)
    monkeypatch.setattr(server_pool, "FIRST_REST", 0.02)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    return tmp_path


def words(server: Loopback, *more: str) -> tuple[str, ...]:
    return ("sample", "prompts.jsonl", "-o", "out.jsonl", "--model", "openai:m", "--base-url", server.url, *more)


def after(count: int, fault: Behaviour) -> Behaviour:
    """`fault` from the request after `count` on."""
    return lambda request: good(request) if request.number <= count else fault(request)


def once(fault: Behaviour) -> Behaviour:
    """`fault` for the first request only."""
    return lambda request: fault(request) if request.number == 1 else good(request)


def finished(folder: Path) -> set[str]:
    """The ids of all rows that are kept, be it behind a gap."""
    files = (folder / "out.jsonl.partial", folder / "out.jsonl.partial.ahead.jsonl", folder / "out.jsonl")
    return {row["id"] for file in files if file.exists() for row in rows_in(file)}


# --- faults that pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "least_s"),
    [
        (lambda _: error(429, Retry_After="1"), 1.0),
        (lambda _: error(429, Retry_After=formatdate(time.time() + 2.5, usegmt=True)), 1.0),
        (lambda _: error(429, Retry_After="soon"), 0.0),
        (lambda _: error(429, Retry_After="-7"), 0.0),
        (lambda _: error(500), 0.0),
        (lambda _: error(503), 0.0),
        (reset, 0.0),
        (cut, 0.0),
    ],
    ids=["429 seconds", "429 date", "429 nonsense", "429 negative", "500", "503", "reset", "cut body"],
)
def test_a_fault_that_passes_costs_one_more_attempt_and_its_wait(
    fault: Behaviour, least_s: float, cai: Cai, inputs: Path
) -> None:
    with Loopback(once(fault)) as server:
        started = time.monotonic()
        done = cai(*words(server, "--limit", "1"))
        took = time.monotonic() - started
    assert done.code == 0, done.stderr
    assert len(server.requests) == 2
    assert took >= least_s
    assert [row["id"] for row in rows_in(inputs / "out.jsonl")] == ["p0"]


def test_a_hang_is_given_half_the_deadline_and_then_another_attempt(cai: Cai) -> None:
    with Loopback(once(hang)) as server:
        assert cai(*words(server, "--limit", "1", "--timeout", "1")).code == 0
    assert len(server.requests) == 2


# --- faults that stay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "attempts", "said"),
    [
        (lambda _: error(429, Retry_After="0.6"), 2, "HTTP 429"),
        (lambda _: error(429, Retry_After="86400"), 1, "HTTP 429"),
        (lambda _: error(500, "out of memory"), 3, "HTTP 500: out of memory"),
        (reset, 3, "no answer in 3 attempts (R"),
        (cut, 3, "no answer in 3 attempts (R"),
        (hang, 2, "no complete answer in 1 s (--timeout)"),
        (trickle, 1, "no complete answer in 1 s (--timeout)"),
        (lambda _: HTML, 1, "the reply is not a completion: '<!doctype html>"),
        (lambda _: http(b'{"choices": [', Content_Type="application/json"), 1, "the reply is not a completion"),
        (lambda r: http(completion(r, choices=[])), 1, "the reply contains no choices"),
        (lambda r: http(completion(r, model="other")), 1, "requested the model 'm', answered as 'other'"),
        (lambda _: error(401), 1, "HTTP 401"),
        (lambda _: error(403), 1, "HTTP 403"),
        (lambda _: error(404), 1, "HTTP 404"),
        (lambda _: http(b"", 302, Location="http://127.0.0.1:1/"), 1, "HTTP 302"),
    ],
    ids=["429", "429 absurd", "500", "reset", "cut body", "hang", "one byte a time", "HTML with 200", "half JSON with 200",
         "no choices", "wrong model", "401", "403", "404", "redirect"],
)  # fmt: skip
@pytest.mark.timeout(20)  # a server that hangs or trickles holds a request for longer
def test_a_fault_that_stays_stops_the_run_in_time_and_what_is_finished_is_kept(
    fault: Behaviour, attempts: int, said: str, cai: Cai, inputs: Path
) -> None:
    with Loopback(after(5, fault)) as server:
        done = cai(*words(server, "--concurrency", "1", "--timeout", "1"))
    assert done.code == 1
    assert said in done.stderr
    assert "hint: " in done.stderr
    assert len(done.stderr.splitlines()) == 2 + ("requests wait until" in done.stderr)
    assert len(server.requests) == 5 + attempts
    assert finished(inputs) == {f"p{i}" for i in range(5)}
    with Loopback() as server:
        again = cai(*words(server))
    assert again.code == 0, again.stderr
    assert len(server.requests) == ROWS - 5
    assert [row["id"] for row in rows_in(inputs / "out.jsonl")] == [f"p{i}" for i in range(ROWS)]
    assert manifest_of(inputs / "out.jsonl")["counts"]["rejected"] == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_the_server_refuses_is_sent_once_and_rejected_with_the_reason(
    status: int, cai: Cai, inputs: Path
) -> None:
    def picky(request: Request) -> bytes:
        return error(status, "prompt too\nlong") if request.asked == "question 3" else good(request)

    with Loopback(picky) as server:
        done = cai(*words(server))
    assert done.code == 0, done.stderr
    assert len(server.requests) == ROWS
    (rejected,) = rows_in(inputs / "out.jsonl.rejected.jsonl")
    assert rejected["reason"] == f"refused by the server, HTTP {status}: prompt too long"
    assert json.loads(rejected["row"])["id"] == "p3"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda _: error(500), "no answer, though others have one: HTTP 500: no"),
        (hang, "no answer, though others have one: no complete answer in 1 s (--timeout)"),
        (lambda r: http(completion(r, choices=[])), "no answer, though others have one: the reply contains no choices"),
    ],
    ids=["500", "hang", "no choices"],
)
def test_a_fault_of_one_row_while_others_are_answered_rejects_that_row_alone(
    fault: Behaviour, reason: str, cai: Cai, inputs: Path
) -> None:
    def poisoned(request: Request) -> bytes | None:
        if request.asked != "question 3":
            return good(request)
        time.sleep(0.1)
        return fault(request)

    with Loopback(poisoned) as server:
        assert cai(*words(server, "--concurrency", "2", "--timeout", "1")).code == 0
    assert len(rows_in(inputs / "out.jsonl")) == ROWS - 1
    (rejected,) = rows_in(inputs / "out.jsonl.rejected.jsonl")
    assert rejected["reason"] == reason


def test_a_filtered_reply_is_not_written_as_a_row(cai: Cai, inputs: Path) -> None:
    def filtered(request: Request) -> bytes:
        answer = completion(request, "Sorry")
        answer["choices"][0]["finish_reason"] = "content_filter"
        return http(answer) if request.asked == "question 3" else good(request)

    with Loopback(filtered) as server:
        assert cai(*words(server)).code == 0
    (rejected,) = rows_in(inputs / "out.jsonl.rejected.jsonl")
    assert rejected["reason"] == "the server ended the reply with 'content_filter'"


# --- finished rows ------------------------------------------------------------------------------------------------


def test_rows_finished_behind_an_unfinished_one_are_kept_and_the_bytes_are_those_of_a_calm_run(
    cai: Cai, inputs: Path
) -> None:
    answered = threading.Event()

    def first_row_fails_last(request: Request) -> bytes | None:
        if request.asked != "question 0":
            if len(server.requests) >= 8:
                answered.set()
            return good(request)
        answered.wait(10)
        return error(401)

    with Loopback() as calm:
        assert cai(*words(calm, "-o", "calm.jsonl")).code == 0
    with Loopback(first_row_fails_last) as server:
        assert cai(*words(server, "--concurrency", "4")).code == 1
    kept = finished(inputs)
    assert len(kept) >= 6
    assert not (inputs / "out.jsonl.partial").exists()
    with Loopback() as server:
        assert cai(*words(server)).code == 0
    assert {f"p{request.asked.split()[1]}" for request in server.requests} == {f"p{i}" for i in range(ROWS)} - kept
    assert (inputs / "out.jsonl").read_bytes() == (inputs / "calm.jsonl").read_bytes()
    usage = manifest_of(inputs / "out.jsonl")["run"]["usage"]
    assert usage["requests"] == ROWS
    assert not list(inputs.glob("out.jsonl.partial*"))


@pytest.mark.parametrize("stage", ["sample", "critique-revise"])
def test_a_server_that_restarts_in_the_middle_costs_no_finished_row(
    stage: str, cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_client, "RETRIES", 6)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.1)
    write_rows(inputs / "prompts.jsonl", (sample_row(i) for i in range(ROWS)))
    dying, gone = threading.Event(), threading.Event()

    def behave(request: Request) -> bytes | None:
        if request.number < 6:
            return good(request)
        dying.set()
        gone.wait(10)
        return None

    def restart() -> None:
        dying.wait(10)
        server.__exit__()
        gone.set()
        time.sleep(0.5)
        second.port = server.port
        second.__enter__()

    server, second = Loopback(behave), Loopback()
    with server:
        keeper = threading.Thread(target=restart)
        keeper.start()
        more = ("--rounds", "1") if stage == "critique-revise" else ()
        done = cai(stage, *words(server, "--concurrency", "3", *more)[1:])
        keeper.join()
    second.__exit__()
    assert done.code == 0, done.stderr
    assert [row["id"] for row in rows_in(inputs / "out.jsonl")] == [f"p{i}" for i in range(ROWS)]
    steps = 2 if stage == "critique-revise" else 1
    assert 5 + len(second.requests) == steps * ROWS


@pytest.mark.timeout(20)  # the server hangs for 30 s
def test_an_interrupt_does_not_wait_for_a_server_that_hangs(
    cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(request: Request) -> bytes | None:
        if request.number < 8:
            return good(request)
        if request.number == 8:
            threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        return hang(request)

    with Loopback(behave) as server:
        assert cai(*words(server, "--concurrency", "2")).code == 130
    assert len(finished(inputs)) >= 7


# --- money and keys -----------------------------------------------------------------------------------------------


def test_a_spent_budget_stops_the_run_and_a_larger_one_resumes_it(cai: Cai, inputs: Path) -> None:
    with Loopback() as server:
        stopped = cai(*words(server, "--budget-tokens", "75", "--concurrency", "1"))
        same = cai(*words(server, "--budget-tokens", "75", "--concurrency", "1"))
        assert [(done.code, done.error) for done in (stopped, same)] == [(1, "budget-spent")] * 2
        assert "hint: finished rows are kept; run the same command with a larger budget to resume" in same.stderr
        assert finished(inputs) == {f"p{i}" for i in range(5)}
        assert len(server.requests) == 5
        done = cai(*words(server, "--budget-tokens", "1000", "--price-in", "2", "--price-out", "10"))
    assert done.code == 0, done.stderr
    assert len(server.requests) == ROWS
    usage = manifest_of(inputs / "out.jsonl")["run"]["usage"]
    assert (usage["prompt_tokens"], usage["new_tokens"], usage["requests"]) == (120, 60, ROWS)
    assert usage["cost"] == pytest.approx((120 * 2 + 60 * 10) / 1e6)
    assert "120 prompt + 60 new tokens for 0.0008" in done.stderr


def test_a_budget_needs_a_server_that_counts(cai: Cai) -> None:
    with Loopback(lambda request: http(completion(request, usage=None))) as server:
        stopped = cai(*words(server, "--budget-tokens", "75", "--concurrency", "1"))
        assert (stopped.code, stopped.error) == (1, "wrong-answer")
        assert cai(*words(server)).code == 0


def _echo_key(status: int) -> Callable[[Request], bytes]:
    return lambda request: error(status, f"bad key {request.headers['authorization']}")


@pytest.mark.parametrize("behaviour", [good, _echo_key(401), _echo_key(400), _echo_key(500), reset])
def test_the_key_is_sent_and_appears_in_no_file_and_no_message(behaviour: Behaviour, cai: Cai, inputs: Path) -> None:
    with Loopback(behaviour) as server:
        done = cai(*words(server, "--json"))
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in done.stdout + done.stderr
    for file in inputs.iterdir():
        assert KEY.encode() not in file.read_bytes()
