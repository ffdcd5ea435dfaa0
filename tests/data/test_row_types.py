"""One detector tells row types apart: every row that is written is detected as what it is."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import RowError
from cai_cli.data import evaluation_schema, reward_schema, row_types, schema
from cai_cli.data.evaluation_schema import (
    AdherenceResult,
    EvaluationQuestion,
    EvaluationResult,
    HarmScore,
    JudgedTurn,
    LabelledReply,
    ModelComparison,
)
from cai_cli.data.reward_schema import JudgedReplies, RubricPrompt
from cai_cli.data.row_types import has_key, parse_row, row_key, row_type_of
from cai_cli.data.schema import (
    ContrastSample,
    Critique,
    Identified,
    JudgedPair,
    Message,
    Pair,
    PolicySample,
    Preference,
    Prompt,
    ProposedPrinciple,
    Rejected,
    Revision,
    RevisionRound,
    Row,
    Sample,
    Scored,
    Vote,
    WorkItemRecord,
    dump_row,
)

PACKAGE = Path(row_types.__file__).parents[1]
# Rows inside other rows: no file consists of them.
NESTED = {JudgedTurn, Message, RevisionRound, Vote, evaluation_schema.OptionScores, reward_schema.CriterionAnswer}
NESTED |= {reward_schema.RubricItem, RubricPrompt}  # the latter is an input only

texts = st.text(st.characters(codec="utf-8"), max_size=9)
names = texts.filter(bool)
optional = st.none() | texts
share, at_least_half = st.floats(0, 1), st.floats(0.5, 1)
number = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**31)


def message(role: str) -> st.SearchStrategy[list[dict[str, str]]]:
    return texts.map(lambda content: [{"role": role, "content": content}])


kind = st.sampled_from([None, "red-team", "helpful"])
prompt = {"id": names, "prompt": message("user"), "kind": kind, "source": optional}
sample = prompt | {
    "sample_index": counts,
    "completion": message("assistant"),
    "finish_reason": optional,
    "thoughts": optional,
}
rounds = st.fixed_dictionaries(
    {
        "round": st.just(1),
        "principle_id": texts,
        "critique": optional,
        "response": texts,
        "finish_reason": optional,
        "thoughts": optional,
    }
)
votes = st.lists(
    st.fixed_dictionaries(
        {
            "principle_id": texts,
            "method": texts,
            "order": st.sampled_from(["ab", "ba"]),
            "p_first": share,
            "rationale": optional,
        }
    ),
    max_size=2,
)
answers = {name: message("assistant") for name in ("a", "b", "chosen", "rejected")}
asking = {"options": st.lists(texts), "correct": st.lists(st.booleans()), "p": st.lists(share)}
FIELDS: dict[type[Row], dict[str, st.SearchStrategy[Any]]] = {
    Prompt: prompt,
    Sample: sample,
    ContrastSample: sample
    | {"principle_id": texts, "contrast": st.sampled_from(["following", "breaking"]), "own_system": optional},
    Critique: sample
    | {"history": st.lists(rounds, max_size=2), "round": st.just(1), "principle_id": texts, "critique": texts},
    Revision: sample | {"history": st.lists(rounds, min_size=1, max_size=2)},
    Scored: sample | {"score": number},
    PolicySample: sample
    | {
        "score": st.none() | number,
        "judge_score": st.none() | number,
        "step": counts,
        "reply_tokens": counts,
        "monitor_score": st.none() | number,
    },
    HarmScore: sample | {"harm": st.floats(0, 4), "levels": st.lists(share, min_size=5, max_size=5)},
    LabelledReply: sample
    | {
        "safety": st.none() | st.sampled_from(["safe", "unsafe"]),
        "label": st.just("compliance"),
        "judged": st.none() | st.just("full_refusal"),
        "p_labels": st.none() | st.lists(share, min_size=3, max_size=3),
    },
    JudgedReplies: {
        "id": names,
        "prompt_hash": texts,
        "replies": st.lists(texts, min_size=1, max_size=2),
        "answers": st.lists(
            st.builds(dict, criterion_id=texts, log_odds=st.lists(number, min_size=2, max_size=2)), max_size=2
        ),
        "ends_batch": st.booleans(),
    },
    Pair: {
        "id": names,
        "prompt": message("user"),
        "a": answers["a"],
        "b": answers["b"],
        "human": st.sampled_from([None, "a", "b"]),
        "source": optional,
        "a_finish_reason": optional,
        "b_finish_reason": optional,
    },
    Preference: {
        "id": names,
        "prompt": message("user"),
        "chosen": answers["chosen"],
        "rejected": answers["rejected"],
        "p_chosen": at_least_half,
        "votes": votes,
        "human": st.sampled_from([None, "chosen", "rejected"]),
        "source": optional,
        "chosen_finish_reason": optional,
        "rejected_finish_reason": optional,
    },
    ProposedPrinciple: {"id": names, "sample_index": counts, "comparison": names},
    JudgedPair: {
        "id": names,
        "prompt_id": names,
        "source": optional,
        "p_chosen": at_least_half,
        "chosen_score": number,
        "rejected_score": number,
        "chosen_tokens": counts,
        "rejected_tokens": counts,
    },
    ModelComparison: {
        "id": names,
        "prompt_id": names,
        "sample_index": counts,
        "prompt": message("user"),
        "kind": kind,
        "model_a": texts,
        "model_b": texts,
        "a": answers["a"],
        "b": answers["b"],
        "score_a": st.none() | number,
        "score_b": st.none() | number,
        "p_a": share,
        "votes": votes,
    },
    AdherenceResult: {
        "id": names,
        "model": texts,
        "principle_id": texts,
        "scenario": texts,
        "conversation": texts,
        "questions": st.lists(texts, min_size=2, max_size=2),
        "messages": st.tuples(message("user"), message("assistant")).map(lambda turns: turns[0] + turns[1]),
        "pressure": st.sampled_from(["scripted", "attacker"]),
        "turns": st.lists(
            st.fixed_dictionaries(
                {
                    "finish_reason": optional,
                    "log_odds": st.none() | st.lists(number, min_size=2, max_size=2),
                    "p_violation": st.none() | share,
                    "human": st.none() | st.booleans(),
                }
            ),
            min_size=1,
            max_size=1,
        ),
    },
    EvaluationQuestion: {
        "id": names,
        "prompt": names,
        "corrects": st.just(["yes"]),
        "incorrects": st.just(["no"]),
        "text_correct": optional,
        "text_incorrect": optional,
        "source": optional,
    },
    EvaluationResult: {
        "id": names,
        "askings": st.lists(st.fixed_dictionaries(asking), min_size=1, max_size=2),
        "p_correct": share,
        "right": st.booleans(),
        "tie": st.booleans(),
        "source": optional,
    },
    Rejected: {"key": texts, "reason": texts, "row": texts},
    WorkItemRecord: {"key": texts, "line": counts, "digest": counts},
}


def types_of_files() -> set[type[Row]]:
    values = [*vars(schema).values(), *vars(evaluation_schema).values(), *vars(reward_schema).values()]
    return {t for t in values if isinstance(t, type) and issubclass(t, Row)} - {Row, Identified} - NESTED


def test_every_row_type_of_a_file_is_drawn_below() -> None:
    assert set(FIELDS) == types_of_files()
    assert all(set(fields) == {f.alias or n for n, f in t.model_fields.items()} for t, fields in FIELDS.items())


@pytest.mark.parametrize("row_type", FIELDS, ids=lambda row_type: row_type.__name__)
def test_a_dumped_row_is_detected_and_parsed_as_itself(row_type: type[Row]) -> None:
    @given(st.fixed_dictionaries(FIELDS[row_type]))
    def check(fields: dict[str, Any]) -> None:
        value = orjson.loads(dump_row(row_type.model_validate(fields)))
        assert row_type_of(value) is row_type
        assert has_key(value)
        row = parse_row(value)
        assert type(row) is row_type
        if row_type is not PolicySample:  # it is never resumed row by row, and its messages leave the step out
            assert row_key(value) == row.key

    check()


@pytest.mark.parametrize(
    ("value", "row_type"),
    [
        ({"prompt": "q"}, Prompt),
        ({"messages": []}, Prompt),
        ({"chosen": "", "rejected": ""}, Preference),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Preference),
        ({"prompt": "q", "completion": "a"}, Sample),
        ({"reason": "too long", "row": "{}"}, Rejected),
        ({"a": [], "b": []}, Pair),
        ({"text": "q"}, None),
        ({}, None),
        ("q", None),
        ([{"prompt": "q"}], None),
    ],
)
def test_foreign_formats_have_the_type_they_are_read_as(value: object, row_type: type[Row] | None) -> None:
    assert row_type_of(value) is row_type


@pytest.mark.parametrize(("value", "code"), [({"text": "q"}, "unknown-row-type"), ({"prompt": "q"}, "invalid-row")])
def test_what_is_not_one_of_our_rows_is_not_parsed(value: object, code: str) -> None:
    with pytest.raises(RowError) as error:
        parse_row(value)
    assert error.value.code == code


def test_a_row_without_key_and_id_has_no_key() -> None:
    assert not has_key({"sample_index": 1})
    with pytest.raises(KeyError):
        row_key({"sample_index": 1})


def test_no_other_module_tells_rows_apart_by_their_fields() -> None:
    marks = {mark for _, fields in row_types._MARKS for mark in fields}
    guess = re.compile(rf'"(?:{"|".join(marks)})" (?:not )?in (?:value|row|left|fields|first)\b|<= fields\b')
    files = [file for file in PACKAGE.rglob("*.py") if file.name not in ("row_types.py", "formats.py")]
    assert [str(file) for file in files if guess.search(file.read_text(encoding="utf-8"))] == []
