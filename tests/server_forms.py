"""OpenAI-compatible servers as they are found: each behaviour refuses and answers in the words and forms of one of them.

Each answers as a judge that prefers the first reply, to questions with options, and with a few words to others.
"""

import json
from collections.abc import Callable

from loopback import Json, Request, completion, http

LIKELIEST = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.4}]


def refusal(message: str, status: int = 400, **fields: str | None) -> bytes:
    return http({"error": {"message": message, "type": "invalid_request_error", **fields}}, status)


def judged(request: Request) -> bool:
    return "Options:" in json.dumps(request.body.get("messages", ""))


def answered(request: Request, **changes: object) -> Json:
    """A completion with its log-probabilities where they are requested, and `changes` of its only choice."""
    tokens = (
        [("The answer is: (", []), ("A", LIKELIEST), (")", [])] if judged(request) else [("Some ", []), ("words.", [])]
    )
    content = [{"token": t, "logprob": -0.1, "top_logprobs": likeliest} for t, likeliest in tokens]
    said = "".join(token for token, _ in tokens)
    answer = completion(request, said, logprobs={"content": content} if request.body.get("logprobs") else None)
    answer["choices"][0] |= changes
    return answer


def azure(request: Request) -> bytes:
    """A deployment of a model that takes another name for the length, and only its own temperature."""
    body = request.body
    if "continue_final_message" in body:
        return refusal("Unrecognized request argument supplied: continue_final_message", param=None, code=None)
    if "max_tokens" in body:
        return refusal(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
            param="max_tokens",
            code="unsupported_parameter",
        )
    if body.get("temperature", 1) != 1:
        return refusal(
            f"Unsupported value: 'temperature' does not support {body['temperature']} with this model. Only the default "
            "(1) value is supported.",
            param="temperature",
            code="unsupported_value",
        )
    if request.asked == "question 3":
        return refusal(
            "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
            param="prompt",
            code="content_filter",
        )
    filters = {"hate": {"filtered": False, "severity": "safe"}}
    answer = answered(request, content_filter_results=filters)
    answer["choices"][0]["message"] |= {"refusal": None, "annotations": []}
    return http(answer | {"model": "gpt-4o-2024-08-06", "prompt_filter_results": [{"content_filter_results": filters}]})


def anthropic(request: Request) -> bytes:
    """Anthropic's own server under OpenAI's protocol."""
    if request.body["messages"][-1]["role"] == "assistant":
        return refusal(
            "This model does not support assistant message prefill. The conversation must end with a user message."
        )
    if {"temperature", "top_p"} <= set(request.body):
        return refusal("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")
    answer = answered(request, finish_reason="end_turn", logprobs=None)
    answer["choices"][0]["message"]["refusal"] = None
    return http(answer | {"model": "claude-x-20260101", "service_tier": None})


def mistral(request: Request) -> bytes:
    """Refuses unknown parameters as a validator does, and answers in parts."""
    for name in ("seed", "continue_final_message"):
        if name in request.body:
            wrong = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            return http({"detail": [wrong]}, 422)
    if request.body["messages"][-1]["role"] == "assistant":
        message = "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant"
        return http(
            {"object": "error", "message": message, "type": "invalid_request_message_order", "code": "3230"}, 400
        )
    answer = answered(request, finish_reason="model_length")
    message = answer["choices"][0]["message"]
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    message["content"] = [thinking, {"type": "text", "text": message["content"]}]
    return http(answer)


def openrouter(request: Request) -> bytes:
    """Limits the rate, answers under the name without the variant, and sets thoughts apart."""
    if request.number in (1, 3):
        return http(
            {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "slow down"}}}, 429
        )
    answer = answered(request, finish_reason="STOP", native_finish_reason="STOP", error=None)
    answer["choices"][0]["message"] |= {
        "reasoning": "Hm.",
        "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}],
    }
    return http(answer | {"model": "org/m", "provider": "P"})


def lm_studio(request: Request) -> bytes:
    """Numbers its answers, gives no reason for their end, and counts nothing where there is nothing."""
    answer = answered(request, finish_reason=None)
    usage = {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}
    return http(answer | {"id": 42, "stats": {}, "usage": usage})


def llama_cpp(request: Request) -> bytes:
    """Writes numbers that JSON does not have among the log-probabilities."""
    answer = answered(request, finish_reason="eos")
    for token in (answer["choices"][0]["logprobs"] or {"content": []})["content"]:
        never = [
            {"token": "C", "logprob": float("-inf")},
            {"token": "D", "logprob": float("nan")},
            {"token": "E", "logprob": None},
        ]
        token |= {"id": 1, "bytes": [65], "top_logprobs": [*token["top_logprobs"], *never]}
    return http(answer | {"timings": {"predicted_ms": 1.0}})


def vllm(request: Request) -> bytes:
    """Continues the started turn, and has fields of its own."""
    answer = answered(request, stop_reason=None, token_ids=None)
    answer["choices"][0]["message"] |= {"reasoning_content": None, "reasoning": None, "tool_calls": []}
    if request.body.get("continue_final_message"):
        answer["choices"][0]["message"]["content"] = "A)"
    return http(answer | {"prompt_logprobs": None, "kv_transfer_params": None})


# The model's name in requests, more words of the command line, and whether the server returns log-probabilities.
FORMS: dict[Callable[[Request], bytes], tuple[str, tuple[str, ...], bool]] = {
    azure: ("judge-east", ("--served-as", "gpt-4o-2024-08-06"), True),
    anthropic: ("claude-x-latest", (), False),
    mistral: ("m", (), True),
    openrouter: ("org/m:fast", (), True),
    lm_studio: ("m", (), True),
    llama_cpp: ("m", (), True),
    vllm: ("m", (), True),
}
