"""The endpoint engine: what it sends, what it makes of answers, and how options are scored from log-probabilities."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, sample_row, write_rows
from loopback import Behaviour, Json, Loopback, Request, completion, engine, error, good, http

from cai_cli.data.schema import Message
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling

CHAT = (Message(role="user", content="Which?"),)
CUE = "The answer is: ("


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_chat_goes_to_chat_completions_with_its_sampling_and_seed() -> None:
    with engine(good) as (e, requests):
        (reply,) = e.generate([GenerationRequest(CHAT, seed=2**62 + 7, stop=("END",))], Sampling(9, 0.5, 0.9))
    (request,) = requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Which?"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["END"],
    }
    assert isinstance(reply, Completion)
    assert (reply.finish_reason, reply.prompt_tokens, reply.new_tokens) == ("stop", 10, 5)


def test_raw_text_goes_to_completions_with_its_prefill() -> None:
    with engine(lambda r: http(completion(r, " fine"))) as (e, requests):
        assert e.generate([GenerationRequest("Human: hi", 1, prefill="\n\nAssistant:")], Sampling(9)) == [
            Completion(" fine", "stop", 10, 5)
        ]
    assert (requests[0].path, requests[0].body["prompt"]) == ("/v1/completions", "Human: hi\n\nAssistant:")


def test_a_reply_that_a_server_cuts_inside_a_character_has_no_replacement_mark() -> None:
    with engine(lambda r: http(completion(r, "\u68a8\ufffd"))) as (e, _):
        assert e.generate([GenerationRequest(CHAT, 1)], Sampling(9)) == [Completion("\u68a8", "length", 10, 5)]


@pytest.mark.parametrize("said", ["(A)", "The answer is: ((A)"])
def test_the_prefill_starts_the_assistants_turn_and_is_cut_off_where_it_is_repeated(said: str) -> None:
    with engine(lambda r: http(completion(r, said))) as (e, requests):
        assert e.generate([GenerationRequest(CHAT, 1, prefill=CUE)], Sampling(9)) == [Completion("(A)", "stop", 10, 5)]
    assert requests[0].body["messages"][-1] == {"role": "assistant", "content": CUE}
    assert requests[0].body["continue_final_message"] is True


def test_a_server_that_rejects_the_prefill_fields_gets_later_requests_without_them() -> None:
    with engine(lambda r: error(400, "unknown") if "continue_final_message" in r.body else good(r)) as (e, requests):
        replies = [e.generate([GenerationRequest(CHAT, seed, prefill=CUE)], Sampling(9))[0] for seed in range(3)]
    assert all(isinstance(reply, Completion) for reply in replies)
    assert len(requests) == 4


def test_a_row_rejected_after_the_prefill_fields_were_accepted_is_sent_once() -> None:
    with engine(lambda r: good(r) if r.number == 1 else error(400, "too long")) as (e, requests):
        e.generate([GenerationRequest(CHAT, 1, prefill=CUE)], Sampling(9))
        refused = e.generate([GenerationRequest(CHAT, 2, prefill=CUE)], Sampling(9))
    assert refused == [RequestFailure("refused by the server, HTTP 400: too long")]
    assert len(requests) == 2


# --- options ------------------------------------------------------------------------------------------------------


def chat_logprobs(*tokens: tuple[str, dict[str, float]]) -> Json:
    """Tokens that were written, each with the likeliest at its place."""
    return {
        "content": [
            {"token": t, "logprob": -0.1, "top_logprobs": [{"token": k, "logprob": v} for k, v in likely.items()]}
            for t, likely in tokens
        ]
    }


AB = {"A": -0.5, "B": -1.5, "C": -3.0}


def scored(behaviour: Behaviour, question: LogprobRequest) -> tuple[list[float] | RequestFailure, list[Request]]:
    with engine(behaviour) as (e, requests):
        (answer,) = e.option_logprobs([question])
    return answer, requests


def says(*tokens: tuple[str, dict[str, float]]) -> Callable[[Request], bytes]:
    return lambda request: http(completion(request, "".join(t for t, _ in tokens), logprobs=chat_logprobs(*tokens)))


@pytest.mark.parametrize(
    "tokens",
    [
        [("A", AB), (")", {})],
        [("The", {"The": -0.1, "A": -3.0, "B": -9.0}), (" answer", {}), (" is", {}), (":", {}), (" (", {}), ("A", AB), (")", {})],
        [("B", AB)],
        [(" A", AB), (".\n", {}), ("Because", {})],
        [("A)", {"A)": -0.5, "B)": -1.5})],
    ],
)  # fmt: skip
def test_a_chat_is_scored_at_the_position_of_the_answer(tokens: list[tuple[str, dict[str, float]]]) -> None:
    answer, requests = scored(says(*tokens), LogprobRequest(CHAT, ("A", "B"), CUE))
    assert answer == pytest.approx([-0.5, -1.5])
    assert len(requests) == 1
    assert requests[0].body["temperature"] == 0
    assert (requests[0].body["logprobs"], requests[0].body["top_logprobs"]) == (True, 20)


@pytest.mark.parametrize(
    "tokens",
    [
        [("A", AB), (" good", {}), (" reply", {})],
        [("A", AB), ("nd", {})],
        [("Completion", {}), (" (", {}), ("A", AB), (")", {})],
        [("I", {"I": -0.1, "A": -3.0, "B": -4.0}), (" cannot", {})],
        [("A", {"A": -0.001, "I": -9.0}), (")", {})],
        [],
    ],
    ids=["article", "part of a word", "in a sentence", "neither", "the other is not among the likeliest", "nothing"],
)
def test_a_missing_answer_is_requested_without_the_prefill_and_then_gives_no_vote(
    tokens: list[tuple[str, dict[str, float]]],
) -> None:
    answer, requests = scored(says(*tokens), LogprobRequest(CHAT, ("A", "B"), CUE))
    assert isinstance(answer, RequestFailure)
    assert answer.reason.startswith("no vote")
    assert [len(r.body["messages"]) for r in requests] == [2, 1]


def test_the_second_form_of_the_request_counts() -> None:
    def behave(request: Request) -> bytes:
        return (
            says(("I", {}), (" see", {}))(request)
            if request.number == 1
            else says(("(A", {"(A": -0.2, "(B": -2.0}))(request)
        )

    assert scored(behave, LogprobRequest(CHAT, ("A", "B"), CUE))[0] == pytest.approx([-0.2, -2.0])


def test_spellings_of_one_option_are_summed() -> None:
    answer, _ = scored(
        says(("A", {"A": math.log(0.5), " A": math.log(0.25), "B": math.log(0.1)})),
        LogprobRequest(CHAT, ("A", "B"), CUE),
    )
    assert answer == pytest.approx([math.log(0.75), math.log(0.1)])


def raw_likeliest(likely: dict[str, float]) -> Callable[[Request], bytes]:
    return lambda r: http(
        completion(r, "A", logprobs={"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [likely]})
    )


def test_raw_text_is_scored_from_the_first_new_token() -> None:
    answer, requests = scored(raw_likeliest({"A": -0.5, "B": -1.5}), LogprobRequest("Which?\n\n", ("A", "B"), CUE))
    assert answer == pytest.approx([-0.5, -1.5])
    assert requests[0].body["prompt"] == f"Which?\n\n{CUE}"
    assert (requests[0].body["max_tokens"], requests[0].body["logprobs"]) == (1, 20)


def echoing(request: Request, shown: int | None = None) -> bytes:
    """Tokens of one character, each a natural unit less likely than the one before; `x` is a token with its neighbour.
    `shown`: how many of them, if not all."""
    if not request.body.get("echo"):
        return raw_likeliest({"A": -0.5})(request)
    prompt = request.body["prompt"]
    tokens = [*prompt, "!"] if "x" not in prompt else [prompt[:-2], prompt[-2:], "!"]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    values = [None, *(-float(i) for i in range(1, len(tokens)))]
    found: Json = {"tokens": tokens[:shown], "token_logprobs": values[:shown], "text_offset": offsets[:shown]}
    usage = {"prompt_tokens": len(tokens) - 1, "completion_tokens": 1}
    return http(completion(request, f"{prompt}!", logprobs=found, usage=usage))


def test_an_option_missing_there_is_scored_from_an_echo() -> None:
    answer, requests = scored(echoing, LogprobRequest("ab", ("A", "BC"), ":"))
    assert answer == pytest.approx([-3.0, -3.0 - 4.0])
    assert [r.body["prompt"] for r in requests] == ["ab:", "ab:A", "ab:BC"]


def test_an_option_that_shares_a_token_with_the_prompt_gives_no_vote() -> None:
    answer, _ = scored(echoing, LogprobRequest("ab", ("x", "B"), ":"))
    assert isinstance(answer, RequestFailure)
    assert answer.reason.startswith("no vote")


def test_an_echo_that_leaves_a_token_out_is_not_trusted() -> None:
    answer, _ = scored(lambda request: echoing(request, shown=-1), LogprobRequest("ab", ("A", "BC"), ":"))
    assert isinstance(answer, RequestFailure)


def test_a_server_without_log_probabilities_gives_no_vote() -> None:
    for question in (LogprobRequest(CHAT, ("A", "B"), CUE), LogprobRequest("raw", ("A", "B"), CUE)):
        answer, _ = scored(good, question)
        assert isinstance(answer, RequestFailure)


def test_a_rejected_question_is_sent_once() -> None:
    answer, requests = scored(lambda _: error(400, "no"), LogprobRequest("raw", ("A", "B"), CUE))
    assert answer == RequestFailure("refused by the server, HTTP 400: no")
    assert len(requests) == 1


# --- through the commands -----------------------------------------------------------------------------------------


def test_preferences_are_labelled_through_a_server(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(5) for k in range(2)))

    def judge(request: Request) -> bytes:
        text = request.body["messages"][-2]["content"]
        first = text.index("reply 0") < text.index("reply 1")  # always for reply 0
        return says(("A", {"A": -0.1, "B": -3.0} if first else {"A": -3.0, "B": -0.1}), (")", {}))(request)

    with Loopback(judge) as server:
        done = cai("label-prefs", "samples.jsonl", "-o", "out.jsonl", "--model", "openai:m", "--base-url", server.url)
    assert done.code == 0, done.stderr
    rows = rows_in(tmp_path / "out.jsonl")
    assert len(rows) == 5
    assert all(row["p_chosen"] == pytest.approx(1 / (1 + math.exp(-2.9))) for row in rows)
    assert all(row["chosen"][0]["content"].startswith("reply 0") for row in rows)


def test_only_the_models_name_decides_the_content_and_the_address_is_recorded(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    words = ("sample", "prompts.jsonl", "-o", "out.jsonl", "--model")
    with Loopback() as server:
        assert cai(*words, "openai:m", "--base-url", server.url).code == 0
        again = cai(*words, "openai:m", "--base-url", "http://elsewhere/v1", "--concurrency", "2", "--timeout", "9")
        assert "nothing to do" in again.stderr
        assert cai(*words, "openai:other", "--base-url", server.url).error == "other-run"
    manifest = manifest_of(tmp_path / "out.jsonl")
    assert manifest["provenance"]["model"] == {"engine": "openai", "name": "m"}
    usage = manifest["run"]["usage"]
    assert (usage["base_url"], usage["models"], usage["cost"]) == (server.url, ["m"], None)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("openai:m",), "missing-option"),
        (("openai:m", "--base-url", "localhost:8000"), "invalid-option"),
        (("openai:m", "--base-url", "http://me:secret@host/v1"), "invalid-option"),
        (("openai:m", "--base-url", "http://host/v1?key=secret"), "invalid-option"),
        (("openai:m", "--base-url", "http://host/v1", "--batch-size", "4"), "option-conflict"),
        (("scripted:any", "--base-url", "http://host/v1"), "option-conflict"),
        (("smollm2-135m", "--budget-tokens", "5"), "option-conflict"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    words: tuple[str, ...], code: str, cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    done = cai("sample", "prompts.jsonl", "--model", *words)
    assert (done.code, done.error) == (2, code)
    assert "secret" not in done.stderr
