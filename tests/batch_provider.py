"""A provider of batches: answers request files with the behaviour of a server on loopback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

from loopback import Behaviour, Request, completion, http
from server_forms import refusal

Json = dict[str, Any]


def rows_of_requests(file: Path) -> list[Json]:
    """The requests in a file, in the form of either provider."""
    text = file.read_text()
    if file.suffix == ".json":
        rows: list[Json] = json.loads(text)["requests"]
        return rows
    return [json.loads(line) for line in text.splitlines()]


def as_chat(row: Json) -> Json:
    """The request to an OpenAI-compatible server that a row stands for."""
    if "body" in row:
        return dict(row["body"])
    params = dict(row["params"])
    system = params.pop("system", None)
    turns = [{"role": "system", "content": system}] if system else []
    return params | {"messages": turns + params["messages"]}


def response(behaviour: Behaviour, body: Json) -> tuple[int, Json]:
    """The status and the body of a server's answer."""
    answer = behaviour(Request(1, "/v1/chat/completions", {}, body, None))  # type: ignore[arg-type]
    assert answer is not None
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


def openai_result(row: Json, status: int, body: Json) -> Json:
    return {"id": "b", "custom_id": row["custom_id"], "error": None, "response": {"status_code": status, "body": body}}


def anthropic_result(row: Json, status: int, body: Json) -> Json:
    if status != 200:
        error = {"type": "error", "error": {"type": "invalid_request_error", "message": body["error"]["message"]}}
        return {"custom_id": row["custom_id"], "result": {"type": "errored", "error": error}}
    (choice,), usage = body["choices"], body["usage"]
    message = {
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": choice["message"]["content"]}],
        "stop_reason": {"stop": "end_turn", "length": "max_tokens"}.get(choice["finish_reason"], "refusal"),
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }
    return {"custom_id": row["custom_id"], "result": {"type": "succeeded", "message": message}}


def provide(files: list[Path], behaviour: Behaviour, result: Callable[[Json, int, Json], Json] = openai_result) -> str:
    """Answer request files, the last request first, in one result file beside the first of them; returns its name."""
    rows = [row for file in files for row in rows_of_requests(file)]
    lines = [json.dumps(result(row, *response(behaviour, as_chat(row)))) for row in reversed(rows)]
    path = files[0].with_suffix(".results.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def judge(request: Request) -> bytes:
    """A hosted model: what it says depends on the prompt and the seed; it continues no started turn, withholds some
    answers and refuses some prompts."""
    if request.body["messages"][-1]["role"] == "assistant":
        return refusal("the conversation must end with a user message")
    drawn = crc32(json.dumps([request.body["messages"], request.body.get("seed")]).encode())
    if "too long" in request.asked:
        return refusal("this prompt is too long")
    if request.body.get("logprobs"):
        top = [{"token": "A", "logprob": -0.1 - drawn % 7}, {"token": "B", "logprob": -0.1 - drawn % 5}]
        tokens = [{"token": "The answer is: (", "logprob": 0.0}, {"token": "A", "logprob": -0.1, "top_logprobs": top}]
        return http(completion(request, "The answer is: (A", logprobs={"content": tokens}))
    if request.body.get("temperature") == 0:
        return http(completion(request, f"The answer is: ({'AB'[drawn % 2]})"))
    answer = completion(request, f"Reply number {drawn} says (A) it kindly.")
    if "forbidden" in request.asked:
        answer["choices"][0]["finish_reason"] = "content_filter"
    return http(answer)
