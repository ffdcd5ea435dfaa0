"""Markdown tables for the cards."""

from collections.abc import Mapping
from typing import Any

from cai_cli.common import console


def table(title: str, values: Mapping[str, Any]) -> str:
    """Return a two-column Markdown table under a heading, or an empty string without values.

    Examples:
        >>> print(table("Statistics", {"rows": 8}))
        ### Statistics
        <BLANKLINE>
        | | |
        |---|---|
        | rows | 8 |
    """
    if not values:
        return ""
    rows = "".join(f"| {cell(name)} | {cell(value)} |\n" for name, value in values.items())
    return (f"### {title}\n\n" if title else "") + f"| | |\n|---|---|\n{rows}".rstrip()


def cell(value: Any) -> str:
    """Return a value as the text of a table cell: one line, with markup and control characters escaped.

    Examples:
        >>> print(cell("a | b <script>"))
        a \\| b \\<script\\>
    """
    text = f"{value:.6g}" if isinstance(value, float) else console.safe(str(value))
    for mark in "\\|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
