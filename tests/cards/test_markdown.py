"""No value of a card breaks out of its table cell."""

from cai_cli.cards.markdown import cell, table


def test_markup_line_ends_and_control_characters_stay_inside_a_cell() -> None:
    assert cell("a\n\n| b") == "a \\| b"
    assert cell("<b>[x](y)</b>\x1b[0m") == "\\<b\\>\\[x\\](y)\\</b\\>\\\\x1b\\[0m"


def test_numbers_are_short_and_a_table_without_values_is_left_out() -> None:
    assert cell(1 / 3) == "0.333333"
    assert table("Statistics", {}) == ""
    assert table("", {"rows": 8, "share": 0.5}).splitlines() == [
        "| | |",
        "|---|---|",
        "| rows | 8 |",
        "| share | 0.5 |",
    ]
