"""Servers as they are found (`server_forms`), through the commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows
from loopback import Loopback, Request, completion, engine, error, http
from server_forms import FORMS, LIKELIEST, anthropic, azure, vllm

from cai_cli.data.schema import Message
from cai_cli.engines import openai_client, server_pool
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, Sampling
from cai_cli.engines.thoughts import never_left

Form = Callable[[Request], bytes]
PAIRS = 4


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(20)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(PAIRS) for k in range(2)))
    monkeypatch.setattr(server_pool, "FIRST_REST", 0.01)
    monkeypatch.setattr(openai_client, "HOLD", 0.1)
    return tmp_path


def words(server: Loopback, model: str, *more: str) -> tuple[str, ...]:
    return ("-o", "out.jsonl", "--model", f"openai:{model}", "--base-url", server.url, *more)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_server_answers_every_prompt_that_it_does_not_object_to(form: Form, cai: Cai, inputs: Path) -> None:
    model, more, _ = FORMS[form]
    with Loopback(form) as server:
        done = cai("sample", "prompts.jsonl", *words(server, model, "--temperature", "0.7", *more))
    assert done.code == 0, done.stderr
    rows = rows_in(inputs / "out.jsonl")
    assert len(rows) == 20 - (form is azure)
    assert {row["completion"][0]["content"] for row in rows} == {"Some words."}
    assert manifest_of(inputs / "out.jsonl")["run"]["usage"]["requests"] == len(rows)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_server_judges_every_pair(form: Form, cai: Cai, inputs: Path) -> None:
    model, more, logprobs = FORMS[form]
    method = "choice" if logprobs else "verdict"
    with Loopback(form) as server:
        done = cai("label-prefs", "samples.jsonl", *words(server, model, "--method", method, "--one-order", *more))
    assert done.code == 0, done.stderr
    rows = rows_in(inputs / "out.jsonl")
    assert len(rows) == PAIRS
    assert all(row["p_chosen"] == pytest.approx(0.9089 if logprobs else 1.0, abs=1e-4) for row in rows)


def test_a_judge_without_log_probabilities_ends_the_run_after_a_few_requests(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "samples.jsonl", (sample_row(i, k) for i in range(100) for k in range(2)))
    with Loopback(anthropic) as server:
        done = cai("label-prefs", "samples.jsonl", *words(server, "claude-x-latest", "--concurrency", "4"))
        assert (done.code, done.error) == (1, "wrong-answer")
        assert "--method verdict" in done.stderr
        assert len(server.requests) < 50
        again = cai(
            "label-prefs", "samples.jsonl", *words(server, "claude-x-latest", "--method", "verdict", "--overwrite")
        )
    assert again.code == 0, again.stderr
    assert len(rows_in(inputs / "out.jsonl")) == 100


def test_a_judge_that_shows_log_probabilities_may_leave_them_out_of_some_answers(cai: Cai, inputs: Path) -> None:
    def seldom(request: Request) -> bytes:
        return (vllm if request.number == 1 else anthropic)(request)

    write_rows(inputs / "samples.jsonl", (sample_row(i, k) for i in range(20) for k in range(2)))
    with Loopback(seldom) as server:
        more = ("--one-order", "--concurrency", "1", "--served-as", "claude-x-20260101")
        done = cai("label-prefs", "samples.jsonl", *words(server, "m", *more))
    assert done.code == 0, done.stderr
    assert manifest_of(inputs / "out.jsonl")["counts"]["rejected"] == 19


# --- what a server refuses ----------------------------------------------------------------------------------------


def test_a_refused_parameter_is_renamed_or_left_out_said_once_and_recorded(cai: Cai, inputs: Path) -> None:
    with Loopback(azure) as server:
        done = cai(
            *("sample", "prompts.jsonl", *words(server, "judge-east", "--served-as", "gpt-4o", "--temperature", "0.7")),
            *("--concurrency", "1"),
        )
    assert done.stderr.count("the server refuses max_tokens; it is sent as max_completion_tokens") == 1
    assert done.stderr.count("requests are sent without it, so temperature 0.7 has no effect") == 1
    usage = manifest_of(inputs / "out.jsonl")["run"]["usage"]
    assert usage["changed_parameters"] == {"max_tokens": "max_completion_tokens", "temperature": None}
    assert len(server.requests) == 20 + 2
    assert "top_p" in server.requests[-1].body


def test_a_parameter_that_a_prompt_only_mentions_is_still_sent(cai: Cai) -> None:
    def too_long(request: Request) -> bytes:
        if request.asked == "question 2":
            return error(400, "the prompt is longer than the context less max_tokens, whatever its temperature or seed")
        return http(completion(request, "Fine."))

    with Loopback(too_long) as server:
        done = cai("sample", "prompts.jsonl", "--limit", "5", *words(server, "m", "--concurrency", "1"))
    assert "the server refuses" not in done.stderr
    assert len(server.requests) == 5
    assert {"max_tokens", "temperature", "top_p", "seed"} <= set(server.requests[-1].body)


def test_a_server_that_takes_no_stop_strings_has_its_replies_cut_there() -> None:
    def no_stop(request: Request) -> bytes:
        refused = error(400, "Unsupported parameter: 'stop' is not supported with this model.")
        return refused if "stop" in request.body else http(completion(request, "One.END Two."))

    with engine(no_stop) as (opened, _):
        (reply,) = opened.generate(
            [GenerationRequest([Message(role="user", content="Count.")], 1, stop=("END",))], Sampling(9)
        )
    assert reply == Completion("One.", "stop", 10, 5)


def no_started_turn(request: Request) -> bytes:
    """Takes no started turn, and answers every question with the first option it can, and log-probabilities."""
    if request.body["messages"][-1]["role"] == "assistant":
        return error(400, "the conversation must end with a user message")
    tokens = [
        ("The answer is: (", []),
        ("A", [*LIKELIEST, *({"token": t, "logprob": -3.0} for t in "01234")]),
        (")", []),
    ]
    logprobs = {"content": [{"token": t, "logprob": -0.1, "top_logprobs": likely} for t, likely in tokens]}
    return http(completion(request, "The answer is: (A)", logprobs=logprobs))


@pytest.mark.parametrize("method", ["choice", "cot", "verdict"])
def test_a_server_without_started_turns_judges_by_every_method_that_asks_for_an_answer(
    method: str, cai: Cai, inputs: Path
) -> None:
    with Loopback(no_started_turn) as server:
        done = cai(
            "label-prefs", "samples.jsonl", *words(server, "m", "--method", method, "--one-order", "--concurrency", "1")
        )
    assert done.code == 0, done.stderr
    assert manifest_of(inputs / "out.jsonl")["counts"]["rejected"] == 0
    refused = [r for r in server.requests if r.body["messages"][-1]["role"] == "assistant"]
    assert len(refused) == (0 if method == "verdict" else 2)


def test_a_server_without_started_turns_rates_harm(cai: Cai, inputs: Path) -> None:
    def rates(request: Request) -> bytes:
        answer = no_started_turn(request)
        return answer.replace(b'"token": "A"', b'"token": "2"')

    with Loopback(rates) as server:
        done = cai("eval", "harm", "samples.jsonl", *words(server, "m"))
    assert done.code == 0, done.stderr
    assert len(rows_in(inputs / "out.jsonl")) == 2 * PAIRS


def test_a_server_without_started_turns_answers_published_questions() -> None:
    question = LogprobRequest([Message(role="user", content="Which?")], (" (A)", " (B)"), "The answer is:")
    with engine(no_started_turn) as (opened, requests):
        (scores,) = opened.option_logprobs([question])
    assert scores == pytest.approx([-0.1, -2.4])
    assert requests[-1].asked == "Which?\n\nBegin your answer with exactly these words: The answer is:"


def test_a_prompt_written_from_its_start_on_does_not_have_its_start_twice(cai: Cai, inputs: Path) -> None:
    def writes(request: Request) -> bytes:
        if request.body["messages"][-1]["role"] == "assistant":
            return error(400, "the conversation must end with a user message")
        start = request.asked.rpartition(": ")[2]
        other = request.number % 2
        return http(completion(request, f"{'Tell me' if other else start} of {request.body['seed']} and why"))

    with Loopback(writes) as server:
        done = cai("red-team", "prompts.jsonl", *words(server, "m", "--n", "6"))
    assert done.code == 0, done.stderr
    texts = [row["prompt"][0]["content"] for row in rows_in(inputs / "out.jsonl")]
    assert {text.split(" of ")[0] for text in texts} <= {"Tell me", *(f"question {i}" for i in range(20))}


# --- limits -------------------------------------------------------------------------------------------------------


def test_equal_refusals_of_the_first_requests_stop_the_run_and_reject_no_row(cai: Cai, inputs: Path) -> None:
    def refuse(request: Request) -> bytes:
        return error(400, f"no such thing (request id: 2026112600000000{request.number})")

    with Loopback(refuse) as server:
        done = cai("sample", "prompts.jsonl", *words(server, "m"))
    assert (done.code, done.error) == (1, "server-refused")
    assert "no such thing" in done.stderr
    assert len(server.requests) < 20
    with Loopback() as server:
        assert cai("sample", "prompts.jsonl", *words(server, "m")).code == 0
    assert len(rows_in(inputs / "out.jsonl")) == 20


@pytest.mark.parametrize("said", ["content management policy", "the prompt is too long"])
def test_refusals_of_prompts_stop_no_run_however_equal(said: str, cai: Cai, inputs: Path) -> None:
    def refuse(request: Request) -> bytes:
        return error(400, said) if request.asked != "question 19" else http(completion(request, "Fine."))

    with Loopback(refuse) as server:
        assert cai("sample", "prompts.jsonl", *words(server, "m")).code == 0
    assert len(rows_in(inputs / "out.jsonl.rejected.jsonl")) == 19


def test_a_limit_holds_all_requests_back_until_its_window_is_over(cai: Cai, inputs: Path) -> None:
    def limited(request: Request) -> bytes:
        if request.number == 1:
            return error(429, "slow down", Retry_After_Ms="300")
        return http(completion(request, "Fine."))

    with Loopback(limited) as server:
        done = cai("sample", "prompts.jsonl", *words(server, "m", "--concurrency", "2"))
    assert done.code == 0, done.stderr
    assert done.stderr.count("requests wait until the limit's window is over") == 1
    assert len(server.requests) == 21


@pytest.mark.parametrize(
    "answer",
    [
        http({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, 429),
        error(402, "Insufficient credits"),
        error(400, "Your credit balance is too low to access the API."),
    ],
    ids=["429", "402", "400"],
)
def test_a_quota_that_is_used_up_stops_the_run_at_once(answer: bytes, cai: Cai, inputs: Path) -> None:
    with Loopback(lambda _: answer) as server:
        done = cai("sample", "prompts.jsonl", *words(server, "m", "--concurrency", "1"))
    assert (done.code, done.error) == (1, "server-refused")
    assert "add credit" in done.stderr
    assert len(server.requests) == 1
    assert not list(inputs.glob("out.jsonl*rejected*"))


# --- what a server answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "answered", "more", "code"),
    [
        ("judge-east", "gpt-4o-2024-08-06", (), 1),
        ("judge-east", "gpt-4o-2024-08-06", ("--served-as", "gpt-4o-2024-08-06"), 0),
        ("judge-east", "gpt-4o-2024-08-06", ("--served-as", "gpt-4o"), 0),
        ("judge-east", "gpt-5", ("--served-as", "gpt-4o"), 1),
        ("claude-x-latest", "claude-x-20260101", (), 0),
        ("org/m:fast", "org/m", (), 0),
        ("org/m:fast", "org/n", (), 1),
    ],
)
def test_another_name_in_the_answer_is_taken_where_the_user_or_the_name_says_so(
    model: str, answered: str, more: tuple[str, ...], code: int, cai: Cai, inputs: Path
) -> None:
    with Loopback(lambda r: http(completion(r, model=answered))) as server:
        done = cai("sample", "prompts.jsonl", "--limit", "3", *words(server, model, *more))
    assert done.code == code, done.stderr
    if code:
        assert f"--served-as {answered}" in done.stderr
        return
    manifest = manifest_of(inputs / "out.jsonl")
    assert manifest["provenance"]["model"]["name"] == model
    assert manifest["run"]["usage"]["models"] == [answered]


def test_a_name_that_changes_during_a_run_is_still_a_warning(cai: Cai) -> None:
    with Loopback(lambda r: http(completion(r, model=f"claude-x-2026010{1 + r.number // 3}"))) as server:
        done = cai("sample", "prompts.jsonl", "--limit", "4", *words(server, "claude-x-latest", "--concurrency", "1"))
    assert done.code == 0
    assert "the server answers as more than one model: claude-x-20260101, claude-x-20260102" in done.stderr


def test_thoughts_stand_beside_the_reply_and_are_never_one(cai: Cai, inputs: Path) -> None:
    def thinks(request: Request) -> bytes:
        answer = completion(request, "A pear.")
        message = answer["choices"][0]["message"]
        message["reasoning_content"] = "They want a fruit."
        if request.asked == "question 1":
            message["content"], answer["choices"][0]["finish_reason"] = None, "length"
        elif request.asked == "question 2":
            message["content"] = ""
        return http(answer)

    with Loopback(thinks) as server:
        done = cai("sample", "prompts.jsonl", "--limit", "5", *words(server, "m"))
    assert done.code == 0
    assert {row["completion"][0]["content"] for row in rows_in(inputs / "out.jsonl")} == {"A pear."}
    reasons = {row["reason"] for row in rows_in(inputs / "out.jsonl.rejected.jsonl")}
    assert reasons == {never_left("length"), never_left("stop")}
    assert {row["thoughts"] for row in rows_in(inputs / "out.jsonl")} == {"They want a fruit."}


def test_anthropics_form_sends_what_it_refuses_once(cai: Cai) -> None:
    with Loopback(anthropic) as server:
        cai("sample", "prompts.jsonl", *words(server, "claude-x-latest", "--concurrency", "1"))
    assert len(server.requests) == 20 + 1
