"""Requests for new prompts, word for word."""

from cai_cli.prompting.red_team import invention_request


def test_an_example_of_several_lines_cannot_end_the_list_of_examples() -> None:
    example = "one\n\nMessage: two"
    raw = invention_request([example], "boats", "How do", "red-team", "raw")
    assert str(raw.text).count("\nMessage:") == 1
    assert raw.prefill == "\nMessage about boats: How do"
    chat = invention_request([example], None, "", "helpful", "chat")
    assert [turn.content for turn in chat.text if not isinstance(turn, str)][1] == "one Message: two"
