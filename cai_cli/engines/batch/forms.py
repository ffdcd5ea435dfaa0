"""The request and result files of each provider, in the form that the provider publishes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cai_cli.common.errors import RowError, UsageError
from cai_cli.engines.openai import PrefillForm
from cai_cli.engines.openai_client import ROW_STATUSES
from cai_cli.engines.openai_failures import Refused, whole_reason
from cai_cli.engines.openai_parameters import Changes, applied
from cai_cli.engines.openai_response import ServerResponse

Json = dict[str, Any]
REFUSED_TYPES = frozenset({"invalid_request_error", "request_too_large"})  # of Anthropic: errors of one request


class Provider(StrEnum):
    """Who answers the request files."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    VLLM = "vllm"


@dataclass(frozen=True)
class Form:
    """How one provider takes requests.

    Attributes:
        request: Makes a line of a request file from a custom id and a request to an OpenAI-compatible server.
        prefill: How the start of an answer is sent.
        names: What parameters are called. A name that stays is listed where refusals must not change it.
        most_requests: The most requests in one file.
        most_bytes: The largest file.
        ending: The ending of a request file's name.
        head: What comes before the first line, and after the last one.
        separator: What comes between two lines.
        logprobs: Whether results hold log-probabilities.
        chat_template: Whether requests may have arguments of the chat template.
        next_steps: The provider's commands, with FILE for a request file.
    """

    request: Callable[[str, Json, Changes], Json]
    prefill: PrefillForm
    names: Changes
    most_requests: int
    most_bytes: int
    next_steps: tuple[str, ...]
    ending: str = "jsonl"
    head: tuple[bytes, bytes] = (b"", b"\n")
    separator: bytes = b"\n"
    logprobs: bool = True
    chat_template: bool = False


# --- requests -------------------------------------------------------------------------------------------------------


def _as_openai(custom_id: str, body: Json, changes: Changes) -> Json:
    """A line for OpenAI's own models, where a parameter at its default is left out: newer models refuse it."""
    sent = {name: value for name, value in body.items() if (name, value) not in (("temperature", 1), ("top_p", 1))}
    return _posted(custom_id, applied(sent, changes))


def _as_vllm(custom_id: str, body: Json, changes: Changes) -> Json:
    """A line for vLLM, which takes all parameters, its own ones included."""
    more = body.get("extra_body", {})
    return _posted(
        custom_id, applied({name: value for name, value in body.items() if name != "extra_body"}, changes) | more
    )


def _posted(custom_id: str, body: Json) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _as_anthropic(custom_id: str, body: Json, changes: Changes) -> Json:
    """A request of Anthropic's Messages API: the system prompt stands apart, and there are no seeds."""
    body = applied(body, changes)
    if body.get("temperature", 0) > 1:
        raise UsageError("Anthropic's models take a --temperature of at most 1", code="invalid-option")
    turns = body["messages"]
    params: Json = {"model": body["model"], "max_tokens": body["max_tokens"]}
    if system := "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system"):
        params["system"] = system
    params["messages"] = [turn for turn in turns if turn["role"] != "system"]
    params |= {name: body[name] for name in ("temperature", "top_p") if body.get(name, 1) != 1}
    if body.get("stop"):
        params["stop_sequences"] = body["stop"]
    return {"custom_id": custom_id, "params": params}


_COLLECT = "cai batch collect FOLDER RESULTS [ERRORS]"
_OPENAI_KEY = '-H "Authorization: Bearer $OPENAI_API_KEY"'
_ANTHROPIC = '-H "x-api-key: $ANTHROPIC_API_KEY" -H "anthropic-version: 2023-06-01"'
FORMS: Mapping[Provider, Form] = {
    Provider.OPENAI: Form(
        _as_openai,
        prefill="in the question",  # a chat cannot end inside the assistant's turn
        names={"max_tokens": "max_completion_tokens"},  # newer models refuse the old name, older ones take both
        most_requests=50_000,
        most_bytes=200_000_000,
        next_steps=(
            f"curl https://api.openai.com/v1/files {_OPENAI_KEY} -F purpose=batch -F file=@FILE",
            f'curl https://api.openai.com/v1/batches {_OPENAI_KEY} -H "Content-Type: application/json" '
            '-d \'{"input_file_id": "ID", "endpoint": "/v1/chat/completions", "completion_window": "24h"}\'',
            "once its status is completed, download the content of its output_file_id and its error_file_id: "
            f"curl https://api.openai.com/v1/files/ID/content {_OPENAI_KEY} -o RESULTS",
            _COLLECT,
        ),
    ),
    Provider.ANTHROPIC: Form(
        _as_anthropic,
        prefill="in the question",  # newer models refuse a started answer
        names={"max_tokens": "max_tokens"},
        most_requests=100_000,
        most_bytes=256_000_000,
        next_steps=(
            f"curl https://api.anthropic.com/v1/messages/batches {_ANTHROPIC} "
            '-H "content-type: application/json" --data-binary @FILE',
            "once its processing_status is ended: "
            f"curl https://api.anthropic.com/v1/messages/batches/ID/results {_ANTHROPIC} -o RESULTS",
            _COLLECT,
        ),
        ending="json",  # the body of the request that creates the batch
        head=(b'{"requests": [\n', b"\n]}\n"),
        separator=b",\n",
        logprobs=False,
    ),
    Provider.VLLM: Form(
        _as_vllm,
        prefill="continued",
        names={"max_tokens": "max_tokens"},
        most_requests=1_000_000,
        most_bytes=2_000_000_000,
        next_steps=("vllm run-batch -i FILE -o RESULTS --model MODEL", _COLLECT),
        chat_template=True,
    ),
}


# --- results --------------------------------------------------------------------------------------------------------


class ResultLine(BaseModel):
    """One line of a result file: OpenAI and vLLM fill `response` and `error`, Anthropic `result`."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    custom_id: str
    response: Any = None
    error: Any = None
    result: Any = None


@dataclass(frozen=True)
class Unanswered:
    """A request that the provider did not answer, for a reason that does not lie in it, such as an expired batch."""

    reason: str


@dataclass(frozen=True)
class BatchResult:
    """What became of one request."""

    custom_id: str
    outcome: ServerResponse | Refused | Unanswered


def read_result(line: bytes) -> BatchResult:
    """The result in a line of a result file.

    Raises:
        RowError: The line does not have the form of a result.
    """
    try:
        row = ResultLine.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RowError(f"not a result of a batch: {'.'.join(map(str, problem['loc']))} {problem['msg']}") from None
    if row.response is None and row.error is None and row.result is None:
        raise RowError(
            "not a result of a batch: it has neither a response nor an error",
            hint="pass the provider's result files, not the request files",
        )
    return BatchResult(row.custom_id, _anthropic(row.result) if row.result is not None else _openai(row))


def _openai(row: ResultLine) -> ServerResponse | Refused | Unanswered:
    response = row.response if isinstance(row.response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200 and not row.error:
        return _completion(body)
    error = row.error or body
    if status in ROW_STATUSES:
        return _refused(error, f", HTTP {status}")
    return Unanswered(_kind_of(error) or f"HTTP {status}")


def _anthropic(result: object) -> ServerResponse | Refused | Unanswered:
    if not isinstance(result, dict) or not isinstance(result.get("type"), str):
        raise RowError("not a result of a batch: its result has no type")
    if result["type"] != "succeeded":
        kind = _kind_of(result.get("error"))
        return _refused(result["error"], "") if kind in REFUSED_TYPES else Unanswered(kind or result["type"])
    message = result.get("message")
    if not isinstance(message, dict):
        raise RowError("not a result of a batch: it succeeded without a message")
    used = message.get("usage") or {}
    read = sum(used.get(name) or 0 for name in _PROMPT_TOKENS)
    choice = {"message": {"content": message.get("content")}, "finish_reason": message.get("stop_reason")}
    usage = {"prompt_tokens": read, "completion_tokens": used.get("output_tokens")}
    return _completion({"model": message.get("model"), "choices": [choice], "usage": usage})


_PROMPT_TOKENS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def _completion(body: object) -> ServerResponse | Unanswered:
    try:
        response = ServerResponse.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RowError(f"the response is not a completion: {'.'.join(map(str, problem['loc']))}") from None
    return response if response.choices else Unanswered("no choices")


def _refused(error: object, status: str) -> Refused:
    text = " ".join(_words_of(error).split())[:200]
    return Refused(f"refused by the server{status}: {text}", whole_reason(error))


def _words_of(error: object) -> str:
    while isinstance(error, dict):
        error = error.get("message") or error.get("error") or error.get("type") or error.get("code")
    return str(error)


def _kind_of(error: object) -> str | None:
    """The innermost code or type of an error, such as `batch_expired`."""
    kind = None
    while isinstance(error, dict):
        given = error.get("code") or error.get("type")
        kind = given if isinstance(given, str) else kind
        error = error.get("error")
    return kind
