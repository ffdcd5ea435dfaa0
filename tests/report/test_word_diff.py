"""A difference of words joins to both texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.report.word_diff import compare_words


@given(st.text(), st.text())
def test_the_pieces_of_a_difference_join_to_both_texts(before: str, after: str) -> None:
    found = compare_words(before, after)
    assert "".join(piece.text for piece in found.before) == before
    assert "".join(piece.text for piece in found.after) == after
    assert {piece.kind for piece in found.before} <= {"same", "del"}
    assert {piece.kind for piece in found.after} <= {"same", "ins"}
    assert 0 <= found.changed <= 1
    assert compare_words(before, before).changed == 0


def test_a_difference_is_one_of_words() -> None:
    found = compare_words("I will not help you.", "I will gladly help you.")
    assert found.before == [("same", "I will "), ("del", "not "), ("same", "help you.")]
    assert found.after == [("same", "I will "), ("ins", "gladly "), ("same", "help you.")]
    assert found.changed == pytest.approx(0.2)
