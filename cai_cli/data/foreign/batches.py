"""Batch files of hosted models: the requests, which hold the prompts, and the results, which hold the replies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.dropped import Dropped
from cai_cli.data.foreign.turns import read_turns, text_of, with_system
from cai_cli.data.schema import Message, json_type

REQUEST_FIELDS = frozenset({"custom_id", "body", "params", "method", "url"})
MESSAGE_FIELDS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning")
# How servers spell why a reply ended -> `finish_reason`; others are kept as they are.
FINISH_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "completed": "stop", "max_tokens": "length",
                  "max_output_tokens": "length", "incomplete": "length"}  # fmt: skip
WITHHELD = frozenset({"content_filter", "refusal"})
MARKS = (frozenset({"custom_id", "response"}), frozenset({"custom_id", "result"}))


@dataclass(frozen=True)
class BatchReply:
    """One reply in a batch result.

    Attributes:
        custom_id: The id of the request.
        index: The number of the reply among those to the request.
        text: Its text.
        finish_reason: "stop", "length", another reason as the server spells it, or None.
    """

    custom_id: str
    index: int
    text: str
    finish_reason: str | None


def is_batch_result(value: object) -> bool:
    """Whether a JSON value is a result of OpenAI's or of Anthropic's batch files."""
    return isinstance(value, dict) and any(marks <= value.keys() for marks in MARKS)


def request_turns(row: Mapping[str, Any], dropped: Dropped) -> list[Message]:
    """The conversation in a batch request. Raises RowError."""
    body = row.get("body", row.get("params"))
    if not isinstance(body, dict):
        raise RowError(f"a batch request has an object as its body, this is {json_type(body)}", code="invalid-row")
    name = next((name for name in ("messages", "input", "prompt") if body.get(name) is not None), "messages")
    turns = read_turns(body.get(name), name, dropped)
    return with_system(body.get("system", body.get("instructions")), turns)


def replies_of(row: Mapping[str, Any], dropped: Dropped) -> list[BatchReply]:
    """The replies in a batch result.

    Raises:
        RowError: It does not have the form of a result.
        UnusableRow: The request failed, or the reply was withheld.
    """
    if not isinstance(row.get("custom_id"), str):
        raise RowError("a batch result without a custom_id", code="invalid-row")
    read = _anthropic if "result" in row else _openai
    replies = list(read(row, dropped))
    for reply in replies:
        if reply.finish_reason in WITHHELD:
            raise UnusableRow(f"the reply was withheld: {reply.finish_reason}")
    if not replies:
        raise UnusableRow("no reply in the batch result")
    return replies


def _openai(row: Mapping[str, Any], dropped: Dropped) -> Iterator[BatchReply]:
    response = row["response"] if isinstance(row["response"], dict) else {}
    status, body = response.get("status_code", 200), response.get("body")
    if row.get("error") or status != 200 or not isinstance(body, dict):
        raise UnusableRow(f"the request failed: {_detail(row.get('error') or body, status)}")
    name = str(row["custom_id"])
    if isinstance(body.get("output"), list):  # of /v1/responses
        texts = [
            text_of(item.get("content"), "output", dropped)
            for item in body["output"]
            if isinstance(item, dict) and item.get("type") == "message"
        ]
        yield BatchReply(name, 0, "\n\n".join(texts), _reason(body.get("status")))
        return
    for place, choice in enumerate(_list(body, "choices")):
        if not isinstance(choice, dict):
            raise RowError("a choice of a batch result is not an object", code="invalid-row")
        index = choice.get("index")
        text = choice["text"] if "text" in choice else _message_text(choice.get("message"), dropped)
        if not isinstance(text, str):
            raise RowError("a choice of a batch result has no text", code="invalid-row")
        index = index if isinstance(index, int) and index >= 0 else place
        yield BatchReply(name, index, text, _reason(choice.get("finish_reason")))


def _anthropic(row: Mapping[str, Any], dropped: Dropped) -> Iterator[BatchReply]:
    result = row["result"] if isinstance(row["result"], dict) else {}
    message = result.get("message")
    if result.get("type") != "succeeded" or not isinstance(message, dict):
        raise UnusableRow(f"the request failed: {_detail(result.get('error'), result.get('type'))}")
    text = _message_text(message, dropped)
    yield BatchReply(str(row["custom_id"]), 0, text, _reason(message.get("stop_reason")))


def _message_text(message: object, dropped: Dropped) -> str:
    if not isinstance(message, dict):
        raise RowError("a choice of a batch result has no message", code="invalid-row")
    if message.get("refusal"):
        raise UnusableRow("the reply was withheld: refusal")
    kept = {name: message[name] for name in MESSAGE_FIELDS if name in message}
    return read_turns([{"role": "assistant", **kept}], "message", dropped)[0].content


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise RowError(f"field {name!r} of a batch result must be a list, this is {json_type(value)}",
                       code="invalid-row")  # fmt: skip
    return value


def _reason(given: object) -> str | None:
    return FINISH_REASONS.get(given, given) if isinstance(given, str) else None


def _detail(error: object, status: object) -> str:
    """What a failed request says about itself, on one line."""
    while isinstance(error, dict):
        error = error.get("message") or error.get("error") or error.get("type")
    text = error if isinstance(error, str) else str(status)
    return " ".join(text.split())[:200]
