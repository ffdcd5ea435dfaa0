"""The reader of result files: every form that a provider publishes, and any other JSON."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_cli.common.errors import RowError
from cai_cli.engines.batch.forms import Unanswered, read_result
from cai_cli.engines.openai_failures import Refused
from cai_cli.engines.openai_response import ServerResponse

CHOICE = {"message": {"content": "A pear."}, "finish_reason": "stop"}
NAMES = st.sampled_from(
    ["custom_id", "response", "result", "error", "status_code", "body", "choices", "message", "type", "usage", "code"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["succeeded", "errored", 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner, max_size=4),
    max_leaves=12,
)


def outcome_of(**row: Any) -> ServerResponse | Refused | Unanswered:
    return read_result(json.dumps({"custom_id": "r", **row}).encode()).outcome


@settings(max_examples=150, deadline=None)
@given(VALUES | st.fixed_dictionaries({"custom_id": st.text()}, optional={"response": VALUES, "result": VALUES,
                                                                          "error": VALUES}))  # fmt: skip
def test_any_json_is_a_result_or_an_invalid_row(value: Any) -> None:
    with suppress(RowError):
        outcome = read_result(json.dumps(value).encode()).outcome
        assert isinstance(outcome, ServerResponse | Refused | Unanswered)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_no_traceback(line: bytes) -> None:
    with pytest.raises(RowError):
        read_result(line)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": None, "error": {"code": "batch_expired", "message": "late"}}, "batch_expired"),
        ({"response": None, "error": {"code": "batch_cancelled", "message": "late"}}, "batch_cancelled"),
        ({"response": {"status_code": 429, "body": {"error": {"code": "rate_limit_exceeded"}}}}, "rate_limit_exceeded"),
        ({"response": {"status_code": 503, "body": None}}, "HTTP 503"),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, "no choices"),
        ({"result": {"type": "expired"}}, "expired"),
        ({"result": {"type": "canceled"}}, "canceled"),
        ({"result": {"type": "errored", "error": {"type": "error", "error": {"type": "api_error"}}}}, "api_error"),
    ],
)
def test_a_failure_of_the_provider_is_asked_again(row: dict[str, Any], reason: str) -> None:
    assert outcome_of(**row) == Unanswered(reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": {"status_code": 400, "body": {"error": {"message": "no"}}}}, "refused by the server, HTTP 400: no"),
        ({"response": {"status_code": 400}, "error": "vLLM says no"}, "refused by the server, HTTP 400: vLLM says no"),
        ({"result": {"type": "errored", "error": {"type": "error", "error": {"type": "invalid_request_error",
          "message": "no"}}}}, "refused by the server: no"),
    ],
)  # fmt: skip
def test_a_refused_request_concerns_its_row(row: dict[str, Any], message: str) -> None:
    outcome = outcome_of(**row)
    assert isinstance(outcome, Refused)
    assert outcome.message == message


def test_a_message_of_anthropic_is_read_with_its_thoughts_and_cached_tokens() -> None:
    content = [{"type": "thinking", "thinking": "A fruit."}, {"type": "text", "text": "A pear."}]
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5}
    message = {"model": "m", "content": content, "stop_reason": "max_tokens", "usage": usage}
    outcome = outcome_of(result={"type": "succeeded", "message": message})
    assert isinstance(outcome, ServerResponse)
    (choice,) = outcome.choices
    assert (choice.content, choice.thoughts, choice.end(5, 9)) == ("A pear.", "A fruit.", "length")
    assert (outcome.tokens.prompt_tokens, outcome.tokens.completion_tokens) == (7, 5)


def test_an_id_that_is_a_number_is_read() -> None:
    assert read_result(json.dumps({"custom_id": 7, "response": {"status_code": 200, "body": {"choices": [CHOICE]}},
                                   "error": None}).encode()).custom_id == "7"  # fmt: skip
