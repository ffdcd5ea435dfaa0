"""What each accepted format is read as, and what is refused."""

import pytest
from helpers import preference, revision, sample_row

from cai_cli.common.errors import RowError
from cai_cli.data import formats
from cai_cli.data.dropped import Dropped
from cai_cli.data.formats import parse_prompt, parse_prompt_with_rubric, sample_or_revision
from cai_cli.data.reward_schema import RubricPrompt
from cai_cli.data.schema import Prompt, Revision


def test_a_critique_is_refused_where_its_reply_is_needed() -> None:
    critique = sample_row(1) | {"history": [], "round": 1, "principle_id": "p", "critique": "c"}
    for parse in (sample_or_revision, formats.completed_row):
        with pytest.raises(RowError) as error:
            parse(critique)
        assert error.value.code == "wrong-row-type"
        assert type(parse(revision(1))) is Revision


def test_judgements_of_replies_are_not_prompts() -> None:
    judged = sample_row(1) | {"harm": 0.0, "levels": [1.0, 0.0, 0.0, 0.0, 0.0]}
    with pytest.raises(RowError) as error:
        parse_prompt(judged, source="here")
    assert error.value.code == "invalid-row"
    assert parse_prompt(preference(1), source="here").id == "p1"


def test_a_rubric_is_read_where_it_is_wanted_and_else_a_column_that_is_left_out() -> None:
    row = {"id": "p", "prompt": "What is a prime?", "rubric": [{"text": "Names 2.", "weight": 2}]}
    prompt = parse_prompt_with_rubric(row, source="x")
    assert isinstance(prompt, RubricPrompt)
    assert (prompt.id, prompt.rubric[0].weight) == ("p", 2)
    dropped = Dropped()
    assert type(parse_prompt(row, source="x", dropped=dropped)) is Prompt
    assert dropped.as_json() == {"rubric": 1}
    for broken in ([], [{"text": ""}], [{"text": "x", "weight": 0}], "Names 2."):
        with pytest.raises(RowError):
            parse_prompt_with_rubric(row | {"rubric": broken}, source="x")
