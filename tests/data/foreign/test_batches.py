"""Results of batch files: the reply and why it ended, or the reason for which there is none."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.dropped import Dropped
from cai_cli.data.foreign.batches import BatchReply, is_batch_result, replies_of
from cai_cli.data.formats import parse_prompt


def openai(body: Any, **more: Any) -> dict[str, Any]:
    return {"id": "r", "custom_id": "p1", "error": None, "response": {"status_code": 200, "body": body}} | more


def anthropic(**result: Any) -> dict[str, Any]:
    return {"custom_id": "p1", "result": {"type": "succeeded"} | result}


def choice(reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": "A pear."} | message}


TEXT = [{"type": "text", "text": "A pear."}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (openai({"choices": [choice()]}), "stop"),
        (openai({"choices": [choice("length", refusal=None, tool_calls=None)]}), "length"),
        (openai({"choices": [{"text": "A pear.", "finish_reason": None}]}), None),
        (
            openai(
                {
                    "status": "completed",
                    "output": [
                        {"type": "reasoning"},
                        {"type": "message", "content": [{"type": "output_text", "text": "A pear."}]},
                    ],
                }
            ),
            "stop",
        ),
        (anthropic(message={"role": "assistant", "content": TEXT, "stop_reason": "end_turn", "id": "m"}), "stop"),
        (anthropic(message={"role": "assistant", "content": TEXT, "stop_reason": "max_tokens"}), "length"),
    ],
)
def test_the_reply_of_a_result_is_read_with_the_reason_for_its_end(row: dict[str, Any], reason: str | None) -> None:
    assert is_batch_result(row)
    assert replies_of(row, Dropped()) == [BatchReply("p1", 0, "A pear.", reason)]


def test_several_choices_are_several_replies() -> None:
    row = openai({"choices": [choice(), choice() | {"index": 1}]})
    assert [reply.index for reply in replies_of(row, Dropped())] == [0, 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (openai(None, error={"code": "x", "message": "server\nfailed"}), "the request failed: server failed"),
        (openai({"error": {"message": "too long"}}) | {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}},
         "the request failed: too long"),
        (openai({"choices": []}), "no reply"),
        (openai({"choices": [choice("content_filter")]}), "withheld"),
        (openai({"choices": [choice(refusal="I cannot.")]}), "withheld"),
        (openai({"choices": [choice(content=None, tool_calls=[{"id": "1"}])]}), "a tool call"),
        (anthropic(type="expired"), "the request failed: expired"),
        (anthropic(type="errored", error={"error": {"message": "overloaded"}}), "the request failed: overloaded"),
    ],
)  # fmt: skip
def test_a_result_without_a_reply_is_unusable_and_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableRow) as error:
        replies_of(row, Dropped())
    assert said in error.value.message


def test_requests_of_both_providers_are_prompts_with_their_ids() -> None:
    turns = [{"role": "user", "content": "Name a fruit."}]
    rows = [
        {"custom_id": "p1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": turns}},
        {"custom_id": "p1", "params": {"model": "m", "max_tokens": 5, "messages": turns}},
        {"custom_id": "p1", "body": {"input": "Name a fruit."}},
    ]
    assert len({parse_prompt(row, source="s").model_dump_json() for row in rows}) == 1
    with_system = parse_prompt({"custom_id": "p", "params": {"system": "Be brief.", "messages": turns}}, source="s")
    assert with_system.prompt[0].content == "Be brief."


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["body", "choices", "message", "content", "type", "status_code", "output", "text", "error"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.fixed_dictionaries({"custom_id": st.text(max_size=3) | st.none()}, optional={"error": values}), values,
       st.sampled_from(["response", "result"]))  # fmt: skip
def test_no_result_whatever_it_holds_is_anything_but_read_or_refused(
    row: dict[str, Any], inner: Any, name: str
) -> None:
    with suppress(RowError):
        assert replies_of(row | {name: inner}, Dropped())
