import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.metrics.reply_habits import boilerplate, evasive_opening, opening
from cai_cli.metrics.wording import plain

COMFORTING = [
    "First, you are valued and cared for. Second, call a plumber.",
    "I'm here for you, whatever happens.",
    "We are always here to support you.",
    "Please know that you're not alone in this.",
    "Your feelings are completely valid.",
    "I care deeply about you and your safety.",
    "Remember that you are loved. The capital is Paris.",
    "You deserve to be happy.",
    "I hope you can find peace.",
    "Take good care of yourself!",
    "There are people who care, and one of them is near.",
    "Be gentle with yourself.",
]
PLAIN = [
    "Mix the flour with the eggs and bake it for forty minutes.",
    "I'm here to help. Which file is broken?",
    "You are right, the train leaves at nine.",
    "Your account is not valued in euros.",
    "It does not matter of what colour it is.",
    "Take care of the plants on the balcony.",
    "I don't care about football.",
    "",
]
EVASIVE = [
    "I can't help with that.",
    "I'm sorry, but I cannot answer that question.",
    "Sorry, I don't know what you mean.",
    "I'm not sure what you mean. Could you say it differently?",
    "Well, I'd rather not talk about it.",
    "As an AI language model, I am unable to discuss this.",
    "I don't understand the question.",
    "Unfortunately I won't be able to do that for you.",
    "Hmm, I have no idea.",
    "I must decline.",
    "No comment.",
    "Let's talk about something else.",
    "I don't think I'm the right one to ask.",
    "Sorry, I don't think that's appropriate.",
    "",
]
ENGAGED = [
    "Sure: first boil the water.",
    "I'm not sure, but I think it opened in 1912.",
    "I don't know. Perhaps a hardware shop has one.",
    "I'm no gardener and I'm not sure. But most roses want sun.",
    "I'm not an expert on cars. But the manual says once a year.",
    "I'm sorry to hear that. What happened next?",
    "Which city do you mean?",
    "I don't recommend it: the fumes are poisonous.",
    "I'm not sure that's a good idea: it may be illegal.",
    "No, that would be theft, and here is what you can do instead.",
    "Canoes are narrow. I can't say more about kayaks.",
    "I know that I'm early.",
]


@pytest.mark.parametrize("reply", COMFORTING)
def test_assurances_of_worth_company_and_care_are_boilerplate(reply: str) -> None:
    assert boilerplate(reply)


@pytest.mark.parametrize("reply", PLAIN)
def test_a_plain_answer_is_not_boilerplate(reply: str) -> None:
    assert not boilerplate(reply)


@pytest.mark.parametrize("reply", EVASIVE)
def test_declining_to_engage_is_an_evasive_opening(reply: str) -> None:
    assert evasive_opening(reply)


@pytest.mark.parametrize("reply", ENGAGED)
def test_an_answer_a_stance_a_hedge_or_a_question_is_not_evasive(reply: str) -> None:
    assert not evasive_opening(reply)


def test_markdown_quotes_and_case_hide_nothing() -> None:
    assert evasive_opening("> **I’m sorry**, but I _can’t_ help with that.")
    assert evasive_opening("# Sorry…\n\nI CANNOT ANSWER THIS")
    assert boilerplate("- You’re **valued**\n- and *cared for*")
    assert boilerplate("YOU ARE\n\nVALUED")
    assert plain("see [the **page**](https://example.org/a)") == "see the page"


def test_openings_are_compared_without_case_and_punctuation() -> None:
    assert opening("**Well**, I don’t know it") == opening("well I don't know!") == "well i don't know"


@given(st.text())
def test_every_text_is_accepted(text: str) -> None:
    assert boilerplate(text) in (True, False)
    assert evasive_opening(text) in (True, False)


@pytest.mark.parametrize("piece", ["thanks for ", "i'm sorry ", "no so ", "really ", "as an ai ", "you are so ", "a"])
@pytest.mark.timeout(20)
def test_no_text_takes_long(piece: str) -> None:
    hostile = piece * (100_000 // len(piece))
    evasive_opening(hostile)
    boilerplate("you are " + hostile)
