"""Rows of other tools are told apart by their fields, and read as conversations or pairs."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.dropped import MOST_NAMES, Dropped
from cai_cli.data.foreign.published import PUBLISHED
from cai_cli.data.foreign.shapes import SHAPES, recognize
from cai_cli.data.formats import completed_row, parse_preference, parse_prompt, readable_type, scorable
from cai_cli.data.schema import Message, Preference, Sample

U, G, B = (
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "A pear."},
    {"role": "assistant", "content": "A stone."},
)
HH = "\n\nHuman: Name a fruit.\n\nAssistant: "
# One conversation in every format: the prompt is U, the reply G.
CONVERSATIONS: dict[str, Any] = {
    "messages": {"messages": [U, G]},
    "messages alone": [U, G],
    "ShareGPT": {"conversations": [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "A pear."}]},
    "ShareGPT with roles": {"conversations": [U, G], "system": None},
    "LMSYS": {"conversation_id": "c1", "model": "m", "turn": 1, "conversation": [U, G]},
    "Alpaca": {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    "Dolly": {"instruction": "Name a fruit.", "context": "", "response": "A pear.", "category": "qa"},
    "question and answer": {"question": "Name a fruit.", "answer": "A pear."},
    "prompt and completion": {"prompt": "Name a fruit.", "completion": "A pear."},
    "prompt and response": {"prompt": "Name a fruit.", "response": "A pear."},
    "TRL": {"prompt": [U], "completion": [G]},
    "UltraChat": {"prompt": "Name a fruit.", "prompt_id": "x", "messages": [U, G]},
    "capital roles": {"messages": [{**U, "role": "User"}, {**G, "role": "Assistant"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a fruit."}]}, G]},
    "names": {"messages": [{**U, "name": "user_1", "tool_calls": None}, {**G, "weight": 1}]},
}
# One pair in every format.
PAIRS: dict[str, Any] = {
    "whole conversations": {"chosen": [U, G], "rejected": [U, B]},
    "UltraFeedback": {"prompt": "Name a fruit.", "prompt_id": "a", "chosen": [U, G], "rejected": [U, B],
                      "messages": [U, G], "score_chosen": 8.0, "score_rejected": 3.0},
    "TRL": {"prompt": [U], "chosen": [G], "rejected": [B]},
    "texts": {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A stone."},
    "question": {"system": "", "question": "Name a fruit.", "chosen": "A pear.", "rejected": "A stone."},
    "Alpaca": {"instruction": "Name a fruit.", "input": "", "chosen": "A pear.", "rejected": "A stone."},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Name a fruit."}],
                 "chosen": {"from": "gpt", "value": "A pear."}, "rejected": {"from": "gpt", "value": "A stone."}},
    "HH-RLHF": {"chosen": f"{HH}A pear.", "rejected": f"{HH}A stone."},
}  # fmt: skip


@pytest.mark.parametrize("value", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_one_conversation_is_the_same_prompt_and_completion_in_every_format(value: Any) -> None:
    prompt, sample = parse_prompt(value, source="s"), completed_row(value)
    assert [m.model_dump() for m in prompt.prompt] == [U]
    assert [m.model_dump() for m in sample.prompt] == [U]
    assert sample.reply == "A pear."
    assert scorable(value, "s").prompt == sample.prompt
    assert readable_type(value) is Sample


@pytest.mark.parametrize("value", PAIRS.values(), ids=PAIRS)
def test_one_pair_is_the_same_preference_in_every_format(value: Any) -> None:
    row = parse_preference(value, source="s")
    assert row == parse_preference(PAIRS["texts"], source="s")
    assert (row.chosen[0].content, row.rejected[0].content, row.human) == ("A pear.", "A stone.", "chosen")
    assert readable_type(value) is Preference
    assert parse_prompt(value, source="s").prompt == row.prompt


def test_every_format_of_the_table_is_tried_here_or_is_a_batch_file() -> None:
    tried = {
        next(shape.name for shape in SHAPES if shape.marks <= value.keys())
        for value in [*CONVERSATIONS.values(), *PAIRS.values(), {"question": "", "response": ""}, {"prompt": ""},
                      {"instruction": ""}]
        if isinstance(value, dict)
    }  # fmt: skip
    published = {known.title for known in PUBLISHED.values()}  # test_published.py
    assert {shape.name for shape in SHAPES if "batch" not in shape.name} - published == tried


def test_what_a_format_does_not_have_is_left_out_and_counted() -> None:
    dropped = Dropped()
    completed_row(CONVERSATIONS["names"] | {"lang": "en", "empty": None, "id": "7"}, dropped=dropped)
    assert dropped.as_json() == {"messages[].name": 1, "messages[].weight": 1, "lang": 1}
    dropped = Dropped()
    parse_preference(PAIRS["UltraFeedback"], source="s", dropped=dropped)
    assert set(dropped.as_json()) == {"prompt_id", "messages", "score_chosen", "score_rejected"}


def test_a_source_that_is_no_text_is_a_column_of_another_meaning() -> None:
    dropped = Dropped()
    row = parse_prompt({"instruction": "q", "output": "a", "source": {"url": "x"}}, source="s", dropped=dropped)
    assert (row.source, dropped.as_json()) == ("s", {"source": 1})


def test_the_names_of_what_is_left_out_take_bounded_room() -> None:
    dropped = Dropped()
    parse_prompt({"prompt": "q"} | {f"{i}{'x' * 1000}": 1 for i in range(1000)}, source="s", dropped=dropped)
    assert len(dropped.counts) == MOST_NAMES + 1
    assert dropped.counts["other columns"] == 1000 - MOST_NAMES
    assert max(map(len, dropped.counts)) < 100


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_message_in_a_column_comes_first(column: str) -> None:
    row = parse_prompt({"instruction": "q", "output": "a", column: "Be brief."}, source="s")
    assert [(m.role, m.content) for m in row.prompt] == [("system", "Be brief."), ("user", "q")]
    pair = parse_preference({"question": "q", "chosen": "a", "rejected": "b", column: "Be brief."}, source="s")
    assert pair.prompt == row.prompt


def test_an_alpaca_input_follows_its_instruction_and_a_history_comes_before_it() -> None:
    row = completed_row({"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]})
    assert [m.content for m in row.prompt] == ["Hi", "Hello", "Add.\n\n1, 2"]


def test_a_conversation_that_ends_with_the_user_is_a_whole_prompt_and_completes_at_its_last_reply() -> None:
    value = {"conversations": [U, G, {"from": "human", "value": "Another."}]}
    assert [m.content for m in parse_prompt(value, source="s").prompt] == ["Name a fruit.", "A pear.", "Another."]
    assert completed_row(value).reply == "A pear."


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [([U, G, U, G], [U, B, U, B]), ([U, G], [{**U, "content": "Other?"}, B]), ([U, G], [U, G, U, B])],
)
def test_a_pair_that_parts_before_its_last_turn_is_unusable(chosen: Any, rejected: Any) -> None:
    with pytest.raises(UnusableRow) as error:
        parse_preference({"chosen": chosen, "rejected": rejected}, source="s")
    assert error.value.message == "chosen and rejected part before the last turn"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "12"},
        {"from": "function_call", "value": "f()"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
    ],
)
def test_a_turn_that_is_no_text_is_unusable_and_not_invalid(turn: dict[str, Any]) -> None:
    for parse in (completed_row, lambda value: parse_prompt(value, source="s")):
        with pytest.raises(UnusableRow):
            parse({"messages": [U, turn, G]})


@pytest.mark.parametrize(
    "column", [{"image": "coco/1.jpg"}, {"images": [{"path": "1.jpg"}]}, {"audio": {"path": "a.wav"}}]
)
def test_a_row_with_an_image_or_sound_in_a_column_is_unusable(column: dict[str, Any]) -> None:
    row = {"conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
    (name,) = column
    for value in ({"messages": [U, G]}, row, {"prompt": [U], "chosen": [G], "rejected": [B]}):
        with pytest.raises(UnusableRow, match=name):
            recognize(value | column, Dropped())
        for nothing in (None, "", [], 3):
            assert recognize(value | {name: nothing}, Dropped())


def test_thoughts_in_parts_are_left_out_and_the_developer_is_the_system() -> None:
    dropped = Dropped()
    turns = [{"role": "developer", "content": "Be brief."}, U,
             {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "A pear."}]}]  # fmt: skip
    row = completed_row({"messages": turns}, dropped=dropped)
    assert (row.prompt[0], row.reply) == (Message(role="system", content="Be brief."), "A pear.")
    assert dropped.as_json() == {"messages[].content: thinking": 1}


def test_a_reply_that_its_set_calls_bad_is_never_trained_on() -> None:
    row = {"prompt": "q", "completion": "a", "label": False}
    with pytest.raises(UnusableRow):
        completed_row(row)
    assert completed_row(row | {"label": True}).reply == "a"
    assert parse_prompt(row, source="s").prompt[0].content == "q"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"goal": "q", "aim": "x"}, "its fields are goal, aim"),
        ({"text": "q"}, "a row of plain text"),
        ({"data": [{"prompt": "q"}], "version": 1}, "an object with rows in 'data'"),
        ({"instruction_": "q", "completions": []}, "several scored completions"),
        ({"custom_id": "1", "response": {}}, "a batch result, which does not hold its prompt"),
        ({"conversations": []}, "field 'conversations' must be text or a non-empty list"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, "'narrator' is not a role"),
        ({"conversations": [{"value": "q"}]}, "has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "must be text or parts, this is null"),
        ({"instruction": 3}, "field 'instruction' must be text"),
    ],
)
def test_a_row_that_is_not_read_says_what_it_is(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as error:
        parse_prompt(row, source="s")
    assert said in error.value.message


def test_scores_become_soft_labels_and_may_prefer_the_rejected_reply() -> None:
    row = parse_preference(PAIRS["UltraFeedback"], source="s", soft_from="score")
    assert row.p_chosen == pytest.approx(0.99331, abs=1e-5)
    other = PAIRS["texts"] | {"chosen-rating": 1.0, "rejected-rating": 3.0}
    swapped = parse_preference(other, source="s", soft_from="rating")
    assert (swapped.chosen[0].content, swapped.human) == ("A stone.", "rejected")
    ends = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}
    swapped = parse_preference(other | ends, source="s", soft_from="rating")
    assert (swapped.chosen_finish_reason, swapped.rejected_finish_reason) == ("length", "stop")
    assert swapped.p_chosen == pytest.approx(0.88080, abs=1e-5)
    assert parse_preference(PAIRS["texts"] | {"margin": 0.0}, source="s", soft_from="margin").p_chosen == 0.5
    for bad in ({}, {"score_chosen": "x", "score_rejected": 1}, {"score_chosen": True, "score_rejected": 1}):
        with pytest.raises(RowError):
            parse_preference(PAIRS["texts"] | bad, source="s", soft_from="score")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = sorted(
    {mark for shape in SHAPES for mark in shape.marks} | {"system", "input", "history", "id", "label", "votes"}
)
turns = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "from", "content", "value", "tool_calls"), json_values)
) | st.sampled_from([U, G, B])


@given(st.dictionaries(st.sampled_from(names), json_values | st.lists(turns, max_size=3), max_size=5))
def test_no_row_whatever_it_holds_is_anything_but_read_or_refused_with_a_reason(row: dict[str, Any]) -> None:
    for parse in (
        lambda: recognize(row, Dropped()),
        lambda: parse_prompt(row, source="s"),
        lambda: completed_row(row),
        lambda: parse_preference(row, source="s", soft_from="score"),
        lambda: scorable(row, "s"),
        lambda: readable_type(row),
    ):
        with suppress(RowError):
            parse()
