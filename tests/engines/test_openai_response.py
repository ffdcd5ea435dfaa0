"""Responses in the spellings of servers."""

import pytest

from cai_cli.engines.openai_response import Choice, ServerResponse


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        *((reason, "stop") for reason in ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "", None)),
        *((reason, "length") for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
        *((reason, None) for reason in ("content_filter", "tool_calls", "error", "abort", "SAFETY")),
    ],
)
def test_the_end_of_a_reply_is_read_in_any_spelling(reason: str | None, end: str | None) -> None:
    assert Choice(finish_reason=reason).end(5, 9) == end


def test_a_reply_without_a_reason_ended_at_the_limit_where_it_has_as_many_tokens() -> None:
    assert Choice().end(9, 9) == "length"
    assert Choice().end(0, 9) == "stop"


@pytest.mark.parametrize(
    ("message", "text", "thoughts"),
    [
        ('{"content": "A pear."}', "A pear.", ""),
        ('{"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "pear."}]}', "A pear.", ""),
        (
            '{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},'
            ' {"type": "text", "text": "A pear."}]}',
            "A pear.",
            "Hm.",
        ),
        ('{"content": [{"type": "thinking", "thinking": "Hm."}]}', None, "Hm."),
        ('{"content": null, "refusal": "I will not."}', "I will not.", ""),
        ('{"content": "A pear.", "refusal": null, "reasoning": "Hm."}', "A pear.", "Hm."),
        ('{"content": null, "reasoning_content": "Hm."}', None, "Hm."),
    ],
)
def test_text_and_thoughts_are_told_apart(message: str, text: str | None, thoughts: str) -> None:
    response = ServerResponse.model_validate_json(f'{{"choices": [{{"message": {message}}}]}}')
    assert (response.choices[0].content, response.choices[0].thoughts) == (text, thoughts)


def test_log_probabilities_that_are_no_numbers_are_left_out() -> None:
    top = '[{"token": "A", "logprob": -0.5}, {"token": "B", "logprob": -Infinity}, {"token": "C", "logprob": NaN}]'
    chat = f'{{"content": [{{"token": "A", "logprob": NaN, "top_logprobs": {top}}}]}}'
    raw = '{"tokens": ["A"], "token_logprobs": [NaN], "top_logprobs": [{"A": -0.5, "B": -Infinity}]}'
    for text in (chat, raw):
        logprobs = ServerResponse.model_validate_json(f'{{"choices": [{{"logprobs": {text}}}]}}').choices[0].logprobs
        assert logprobs
        source = logprobs.content[0] if logprobs.content else logprobs
        assert list(source.likeliest()) == [("A", -0.5)]
