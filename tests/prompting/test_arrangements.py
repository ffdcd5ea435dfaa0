"""Few-shot comparisons are arranged by the seed, without bias for a letter, and stay correct."""

from collections import Counter

from cai_cli.constitution.schema import (
    ComparisonExample,
    PreferenceConstitution,
    PreferencePrinciple,
    open_constitution,
)
from cai_cli.prompting.arrangements import ARRANGEMENTS, arrangements, exchanged
from cai_cli.prompting.base import user

PRINCIPLES = [PreferencePrinciple(id=f"rule{i}", comparison=f"By rule {i}?") for i in range(5)]


def example(number: int, **more: str) -> ComparisonExample:
    fields = {"options": [f"good {number}", f"bad {number}"], "answer": "A", **more}
    return ComparisonExample.model_validate({"messages": [user(f"question {number}").model_dump()], **fields})


EXAMPLES = [example(number) for number in range(5)]


def test_every_place_holds_each_letter_equally_often_and_the_answer_stays_the_good_reply() -> None:
    for seed in range(20):
        arranged = arrangements(EXAMPLES, PRINCIPLES, seed)
        assert len(arranged) == ARRANGEMENTS
        for place in range(len(EXAMPLES)):
            assert Counter(one[place].answer for one in arranged) == {"A": 2, "B": 2}
        for one in arranged:
            assert all(e.options["AB".index(e.answer)].startswith("good") for e in one)
            assert sorted(e.messages[0].content for e in one) == [e.messages[0].content for e in EXAMPLES]


def test_the_order_and_the_principles_are_drawn_from_the_seed() -> None:
    assert arrangements(EXAMPLES, PRINCIPLES, 1) == arrangements(EXAMPLES, PRINCIPLES, 1)
    orders = {tuple(e.messages[0].content for e in arrangements(EXAMPLES, PRINCIPLES, seed)[0]) for seed in range(20)}
    assert len(orders) > 10
    questions = Counter(e.comparison for seed in range(40) for e in arrangements(EXAMPLES, PRINCIPLES, seed)[0])
    assert set(questions) == {p.comparison for p in PRINCIPLES}
    assert max(questions.values()) < 70  # of 200, 40 each on average


def test_an_example_keeps_its_own_question_and_one_without_principles_is_asked_under_the_one_in_use() -> None:
    own = example(1, comparison="Which is kinder?")
    assert {e.comparison for one in arrangements([own], PRINCIPLES, 0) for e in one} == {"Which is kinder?"}
    assert {e.comparison for one in arrangements([example(1)], [], 0) for e in one} == {None}


def test_an_example_whose_rationale_names_a_letter_keeps_its_letters() -> None:
    named = example(1, rationale="(B) insults the user. Therefore, option (A) is the best response.")
    assert exchanged(named) == named
    assert exchanged(example(1, rationale="An insult helps nobody.")).options == ["bad 1", "good 1"]


def test_the_shipped_rationales_name_no_letter() -> None:
    for e in open_constitution(PreferenceConstitution, None, None).examples:
        assert exchanged(e).answer != e.answer


def test_without_examples_there_is_one_arrangement() -> None:
    assert arrangements([], PRINCIPLES, 0) == [[]]
