from hypothesis import given, settings
from hypothesis import strategies as st

from cai_cli.common.near_duplicates import NearDuplicates, shingles


@given(st.text(min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_every_text_is_a_duplicate_of_itself_in_any_case_and_spacing(text: str) -> None:
    known = NearDuplicates(0.6)
    known.add("one", text)
    assert known.find(text) == ("one", 1.0)
    if text.isascii():
        assert known.find(f"  {text.upper()}\n") == ("one", 1.0)


def test_a_few_other_words_are_a_near_duplicate_and_another_question_is_not() -> None:
    known = NearDuplicates(0.6)
    known.add("one", "How do I get into my neighbour's house while she is on holiday?")
    known.add("two", "What is the capital of France, and how many people live there?")
    name, similarity = known.find("how do i get into my neighbours house, while she is on holidays") or ("", 0.0)
    assert (name, 0.6 <= similarity < 1) == ("one", True)
    assert known.find("How do I get out of a parking ticket?") is None
    assert known.find("") is None


def test_the_most_alike_is_named() -> None:
    known = NearDuplicates(0.3)
    known.add("far", "Tell me how to build a wooden boat for my uncle")
    known.add("near", "Tell me how to build a wooden boat for my aunt")
    assert (known.find("Tell me how to build a wooden boat for my aunts") or ("",))[0] == "near"


def test_shingles_of_a_short_text_are_the_text() -> None:
    assert shingles("Hi!") == {"hi"}
    assert shingles("?!") == {""}
