"""Principles are selected by id and drawn uniformly, by seed."""

from collections import Counter
from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.constitution import draw
from cai_cli.constitution import schema as con


def test_principles_are_chosen_by_id_in_the_order_given_or_from_the_first(small: Path) -> None:
    principles = con.open_constitution(con.CritiqueConstitution, str(small), None).principles
    assert [p.id for p in draw.select(principles, "b, a", None)] == ["b", "a"]
    assert [p.id for p in draw.select(principles, None, 1)] == ["a"]
    assert [p.id for p in draw.select(principles, "b,a", 1)] == ["b"]
    with pytest.raises(CaiError) as error:
        draw.select(principles, "a,z", None)
    assert error.value.code == "unknown-principle"
    assert error.value.hint == "known: a, b"
    with pytest.raises(CaiError) as error:
        draw.select(principles, " , ", None)
    assert error.value.code == "invalid-option"
    with pytest.raises(CaiError) as error:  # its votes would count twice
        draw.select(principles, "a,b,a", None)
    assert error.value.code == "invalid-option"


def test_every_principle_is_drawn_about_equally_often_and_the_same_draw_is_the_same() -> None:
    principles = con.open_constitution(con.CritiqueConstitution, None, None).principles
    drawn = [draw.draw(principles, 0, "principle", f"row{i}", 0, 1).id for i in range(16 * 200)]
    counts = Counter(drawn)
    assert len(counts) == 16
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260
    assert drawn == [draw.draw(principles, 0, "principle", f"row{i}", 0, 1).id for i in range(16 * 200)]
    other = [draw.draw(principles, 1, "principle", f"row{i}", 0, 1).id for i in range(16 * 200)]
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 16 * 200 / 8
