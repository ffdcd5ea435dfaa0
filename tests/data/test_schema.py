"""Rows come back as they went out, and every accepted form of a prompt becomes the same row."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from helpers import sample_row
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError
from cai_cli.data.formats import parse_preference, parse_prompt
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.row_types import row_key
from cai_cli.data.schema import (
    Critique,
    Message,
    PolicySample,
    Preference,
    Prompt,
    Rejected,
    Revision,
    Row,
    Sample,
    Scored,
    content_hash,
    conversation_id,
    dump_row,
    json_type,
    load_row,
    reject,
)

# No lone surrogates: they are no text, and UTF-8 cannot carry them.
anything = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    ["\u2028", '"\\"', "😀\x00\x1f", "\r\n", "\ufeff", "{}"]
)
ids = anything.filter(bool)


def turns(role: str) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": anything})


prompts = st.tuples(st.lists(turns("system"), max_size=1), st.lists(turns("assistant") | turns("user")), turns("user"))
prompt_fields: dict[str, st.SearchStrategy[Any]] = {
    "id": ids,
    "prompt": prompts.map(lambda parts: [*parts[0], *parts[1], parts[2]]),
    "kind": st.sampled_from(["red-team", "helpful", None]),
    "source": st.none() | anything,
}
reply = st.lists(turns("assistant"), min_size=1, max_size=1)
sample_fields = prompt_fields | {
    "sample_index": st.integers(0, 2**63 - 1),
    "completion": reply,
    "finish_reason": st.none() | anything,
    "thoughts": st.none() | anything,
}
turn = st.fixed_dictionaries(
    {
        "round": st.integers(1, 99),
        "principle_id": anything,
        "critique": st.none() | anything,
        "response": anything,
        "finish_reason": st.none() | anything,
        "thoughts": st.none() | anything,
    }
)
probability = st.floats(0, 1)
vote = st.fixed_dictionaries(
    {
        "principle_id": anything,
        "method": anything,
        "order": st.sampled_from(["ab", "ba"]),
        "p_first": probability,
        "rationale": st.none() | anything,
    }
)
ROWS: dict[type[Row], st.SearchStrategy[dict[str, Any]]] = {
    Prompt: st.fixed_dictionaries(prompt_fields),
    Sample: st.fixed_dictionaries(sample_fields),
    Critique: st.fixed_dictionaries(
        sample_fields
        | {"history": st.lists(turn), "round": st.integers(1, 99), "principle_id": anything, "critique": anything}
    ),
    Revision: st.fixed_dictionaries(sample_fields | {"history": st.lists(turn, min_size=1)}),
    Preference: st.fixed_dictionaries(
        {
            "id": ids,
            "prompt": prompt_fields["prompt"],
            "chosen": reply,
            "rejected": reply,
            "p_chosen": st.floats(0.5, 1),
            "votes": st.lists(vote),
            "human": st.sampled_from([None, "chosen", "rejected"]),
            "source": st.none() | anything,
            "chosen_finish_reason": st.none() | anything,
            "rejected_finish_reason": st.none() | anything,
        }
    ),
    Rejected: st.fixed_dictionaries({"key": ids, "reason": anything, "row": anything}),
}


@given(st.data())
def test_any_row_comes_back_from_its_line_with_its_key(data: st.DataObject) -> None:
    row_type = data.draw(st.sampled_from(list(ROWS)))
    value = data.draw(ROWS[row_type])
    row = load_row(row_type, value)
    line = dump_row(row)
    assert b"\n" not in line
    assert orjson.loads(line) == value
    assert load_row(row_type, orjson.loads(line)) == row
    assert row_key(orjson.loads(line)) == row.key


def test_a_file_of_rows_with_any_text_comes_back_whole(tmp_path: Path) -> None:
    texts = ["\u2028\u2029\x85", '"quoted" \\ back', "😀", "tab\tnul\x00", "two\nlines\r\n", " \ufeff "]
    rows = [Prompt(id=str(i), prompt=[Message(role="user", content=t)]) for i, t in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(dump_row(row) + b"\n" for row in rows))
    assert list(read_rows(str(path), rows_of(Prompt))) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"sample_index": None}, "field 'sample_index'"),
        ({"sample_index": "0"}, "field 'sample_index'"),
        ({"sample_index": -1}, "field 'sample_index'"),
        ({"kind": "harmful"}, "field 'kind'"),
        ({"prompt": []}, "field 'prompt'"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "must end with a user turn"),
        ({"prompt": [{"role": r, "content": r} for r in ("user", "system", "user")]}, "system message can only come first"),
        ({"completion": [{"role": "user", "content": "a"}]}, "one assistant message"),
    ],
)  # fmt: skip
def test_the_error_of_an_invalid_row_names_what_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match="not a Sample row") as error:
        load_row(Sample, {**sample_row(1), **change})
    assert said in error.value.message


def test_a_missing_field_is_named_and_the_others_counted() -> None:
    with pytest.raises(RowError, match=r"field 'completion' is missing \(and 1 more\)"):
        load_row(Sample, {k: v for k, v in sample_row(1).items() if k not in {"completion", "finish_reason"}})


def test_a_preference_below_one_half_is_refused() -> None:
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
        "p_chosen": 0.49,
        "votes": [],
        "source": None,
    }
    with pytest.raises(RowError) as error:
        load_row(Preference, row)
    assert error.value.code == "invalid-row"


# --- prompts as they come -------------------------------------------------------------------------------------------


def said(prompt: Prompt) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in prompt.prompt]


def parse(value: object) -> Prompt:
    return parse_prompt(value, source="here")


HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "hello"},
        {"prompt": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"prompt": "\n\nHuman: hello\n\nAssistant:"},
        {"chosen": "\n\nHuman: hello\n\nAssistant: hi", "rejected": "\n\nHuman: hello\n\nAssistant: go away"},
        {
            "chosen": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            "rejected": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "no"}],
        },
    ],
)
def test_every_form_of_one_prompt_is_one_row_with_one_id(value: object) -> None:
    assert parse(value) == parse("hello")
    assert said(parse(value)) == [("user", "hello")]


def test_hh_rlhf_keeps_every_turn_before_the_last_assistant_turn() -> None:
    prompt = parse({"chosen": f"{HH}good", "rejected": f"{HH}bad"})
    assert said(prompt) == [("user", "one"), ("assistant", "two"), ("user", "three")]


def test_human_turns_after_the_last_reply_are_not_part_of_the_prompt() -> None:
    assert said(parse({"chosen": f"{HH}good\n\nHuman: bye", "rejected": HH})) == said(
        parse({"chosen": f"{HH}good", "rejected": HH})
    )


def test_consecutive_turns_of_one_speaker_are_joined() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"
    assert said(parse({"chosen": text, "rejected": text})) == [("user", "a\n\nb")]


def test_our_own_rows_are_prompts_again() -> None:
    sample = sample_row(3)
    assert parse(sample) == load_row(Prompt, {k: sample[k] for k in ("id", "prompt", "kind", "source")})
    preference = {
        "id": "p3/0-1",
        "prompt": sample["prompt"],
        "chosen": sample["completion"],
        "rejected": sample["completion"],
        "p_chosen": 0.7,
        "votes": [],
        "human": None,
        "source": None,
    }
    assert said(parse(preference)) == [("user", "question 3")]


TURN = {"round": 1, "principle_id": "p", "critique": None, "response": "r"}


@pytest.mark.parametrize(
    ("more", "row_type"),
    [
        ({"history": [TURN]}, Revision),
        ({"history": [], "round": 1, "principle_id": "p", "critique": "c"}, Critique),
        ({"score": 0.5}, Scored),
        ({"score": 0.5, "step": 3, "reply_tokens": 7, "monitor_score": None}, PolicySample),
        ({"score": 0.5, "step": 3, "reply_tokens": 7, "watch_score": None}, PolicySample),  # of version 0.1.0
    ],
)
def test_every_later_row_is_a_prompt_again_and_checked_as_the_row_it_is(
    more: dict[str, Any], row_type: type[Row]
) -> None:
    row = sample_row(3) | more
    assert parse(row) == parse(sample_row(3))
    with pytest.raises(RowError, match=f"not a {row_type.__name__} row: unknown field 'other'"):
        parse(row | {"other": 1})
    for name in more:
        with pytest.raises(RowError):
            parse(row | {name: {}})


def test_fields_of_a_row_take_precedence_over_the_command_line() -> None:
    kept = parse_prompt({"id": 7, "prompt": "q", "kind": "helpful", "source": "mine"}, source="s", kind="red-team")
    assert (kept.id, kept.kind, kept.source) == ("7", "helpful", "mine")
    filled = parse_prompt({"prompt": "q"}, source="s", kind="red-team")
    assert (filled.kind, filled.source) == ("red-team", "s")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "a number"),
        (None, "null"),
        ([], "a list"),
        ({}, "no prompt in this row"),
        ({"text": "q"}, "no prompt in this row"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "a number"),
        ({"prompt": [{"role": "robot", "content": "q"}]}, "field 'role'"),
        ({"prompt": "q", "id": True}, "field 'id'"),
        ({"prompt": "q", "id": ""}, "field 'id'"),
        ({"prompt": "q", "kind": "evil"}, "field 'kind'"),
        ({"prompt": "q", "kind": ""}, "field 'kind'"),
        ({"chosen": "no turns", "rejected": "none"}, "not a transcript"),
        ({"chosen": "\n\nHuman: only me", "rejected": ""}, "no human turn followed by an assistant turn"),
        ({"chosen": 1, "rejected": 2}, "a number"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the prompt is empty"),
    ],
)
def test_an_invalid_prompt_is_refused_with_the_reason(value: object, reason: str) -> None:
    with pytest.raises(RowError) as error:
        parse(value)
    assert reason in error.value.message


def test_a_rejected_row_holds_the_row_it_was_about_as_json_text() -> None:
    row = load_row(Sample, sample_row(1))
    again = load_row(Rejected, orjson.loads(dump_row(reject(row.key, "no", row))))
    assert (again.key, again.reason) == ("p1/0", "no")
    assert orjson.loads(again.row) == sample_row(1) | {"thoughts": None}


def test_a_human_labelled_pair_is_a_preference_without_votes() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    row = parse_preference({"chosen": start + "good", "rejected": start + "bad"}, source="hh")
    assert [m.content for m in row.prompt] == ["a", "b", "c"]
    assert (row.chosen[0].content, row.rejected[0].content) == ("good", "bad")
    assert (row.p_chosen, row.votes, row.human, row.source) == (1.0, [], "chosen", "hh")
    assert parse_preference(orjson.loads(dump_row(row)), source="other") == row


def test_explicit_prompts_and_plain_replies_make_the_same_preference() -> None:
    plain = parse_preference({"prompt": "q", "chosen": "good", "rejected": "bad"}, source="hh")
    turns = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "good"}]}
    assert parse_preference({**turns, "rejected": [{"role": "assistant", "content": "bad"}]}, source="hh") == plain
    assert parse_preference({"prompt": "q", "chosen": "good", "rejected": "worse"}, source="hh").id != plain.id


def test_a_human_pair_with_two_prompts_is_refused() -> None:
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}
    with pytest.raises(RowError) as error:
        parse_preference(pair, source="hh")
    assert error.value.code == "unusable-row"


# --- what an error says, and what an id is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "a list"),
        ("x", "a string"),
        (True, "a boolean"),
        (None, "null"),
        (3, "a number"),
        (0.5, "a number"),
        ({}, "an object"),
    ],
)
def test_a_json_value_is_named_by_its_type(value: object, said: str) -> None:
    assert json_type(value) == said


def test_the_first_problem_of_a_row_is_named_by_its_place_and_the_others_counted() -> None:
    row = sample_row(1)
    del row["source"]
    with pytest.raises(RowError) as error:
        load_row(Sample, row | {"completion": [{"role": "robot", "content": "x"}], "source": None})
    assert error.value.message == (
        "not a Sample row: field 'completion.0.role': input should be 'system', 'user' or 'assistant'"
    )
    with pytest.raises(RowError) as error:
        load_row(Sample, sample_row(1) | {"id": 1, "sample_index": "x", "kind": "y"})
    assert error.value.message == "not a Sample row: field 'id': input should be a valid string (and 2 more)"


def test_a_row_without_an_id_gets_the_hash_of_its_content_in_any_order_of_fields() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) == "0855bfc20eb6cfaa"
    assert conversation_id([Message(role="user", content="é")]) == conversation_id([Message(role="user", content="é")])
    assert len(conversation_id([Message(role="user", content="é")])) == 16


def test_fields_that_a_later_row_lacks_come_from_the_command_line() -> None:
    row = sample_row(1) | {"source": None, "kind": None}
    made = parse_prompt(row, source="file.jsonl", kind="helpful")
    assert (made.source, made.kind) == ("file.jsonl", "helpful")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "rejected"),
        ({"chosen": [], "rejected": []}, "chosen"),
        ({"chosen": 3, "rejected": 3}, "chosen"),
    ],
)
def test_a_pair_s_wrong_part_is_named(row: dict[str, Any], field: str) -> None:
    with pytest.raises(RowError, match=rf"field '{field}' "):
        parse_preference(row, source="s")


def test_a_human_pair_keeps_the_id_it_has_and_a_row_with_votes_is_one_of_ours() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_preference(pair | {"id": "mine"}, source="s").id == "mine"
    assert parse_preference(pair | {"id": None}, source="s").id == parse_preference(pair, source="s").id
    with pytest.raises(RowError) as error:
        parse_preference(pair | {"votes": []}, source="s")
    assert error.value.code == "invalid-row"
    for left in ("chosen", "rejected"):
        with pytest.raises(RowError) as error:
            parse_preference({k: v for k, v in pair.items() if k != left}, source="s")
        assert error.value.code == "invalid-row"
    with pytest.raises(RowError) as error:
        parse_preference(["votes", "chosen", "rejected"], source="s")
    assert error.value.code == "invalid-row"


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nHuman: a", [("user", "a")]),
        ("\n\nHuman: a\n\nAssistant:", [("user", "a")]),
    ],
)
def test_a_transcript_as_a_prompt_loses_only_its_final_assistant_label(text: str, turns: list[tuple[str, str]]) -> None:
    assert said(parse({"prompt": text})) == turns


def test_a_transcript_that_ends_with_an_answer_is_not_a_prompt() -> None:
    with pytest.raises(RowError) as error:
        parse({"prompt": "\n\nHuman: a\n\nAssistant: b"})
    assert error.value.code == "invalid-row"


def test_plain_text_and_half_a_pair_are_read_for_what_they_are() -> None:
    made = parse_prompt("q", source="file.txt", kind="red-team")
    assert (made.source, made.kind, said(made)) == ("file.txt", "red-team", [("user", "q")])
    with pytest.raises(RowError) as error:
        parse({"chosen": HH})
    assert error.value.code == "invalid-row"


def test_a_preference_of_ours_keeps_its_votes_and_its_probability() -> None:
    row = {
        "id": "p",
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "p_chosen": 0.7,
        "votes": [{"principle_id": "x", "method": "choice", "order": "ab", "p_first": 0.7, "rationale": None}],
        "human": None,
        "source": None,
    }
    assert parse_preference(row, source="s") == load_row(Preference, row)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_field_of_the_wrong_type_is_named(field: str) -> None:
    with pytest.raises(
        RowError, match=f"field '{field}' must be text or a non-empty list of messages, this is a number"
    ):
        parse({field: 3})
