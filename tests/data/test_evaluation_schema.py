"""Questions of the published evaluations: their options, ids, and what is refused."""

from typing import Any

import pytest

from cai_cli.common.errors import RowError
from cai_cli.data.evaluation_schema import parse_question

QUESTION: dict[str, Any] = {"prompt": "q?", "corrects": [" (B)"], "incorrects": [" (C)", " (A)"]}


def test_options_are_in_the_order_of_their_letters() -> None:
    assert parse_question(QUESTION).options == [" (A)", " (B)", " (C)"]


def test_a_question_without_an_id_gets_that_of_its_content() -> None:
    assert parse_question(QUESTION).id == parse_question(dict(QUESTION)).id
    assert parse_question({**QUESTION, "id": None}).id
    assert parse_question(QUESTION).id != parse_question({**QUESTION, "prompt": "r?"}).id
    assert parse_question({**QUESTION, "id": "mine"}).id == "mine"


@pytest.mark.parametrize(
    "change",
    [{"corrects": []}, {"corrects": [" (A)"]}, {"incorrects": [""]}, {"incorrects": [" (A)", " (A)"]}, {"prompt": ""}],
)
def test_a_question_without_distinct_options_is_invalid(change: dict[str, Any]) -> None:
    with pytest.raises(RowError) as error:
        parse_question(QUESTION | change)
    assert error.value.code == "invalid-row"
