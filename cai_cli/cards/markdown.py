"""Markdown tables for model and dataset cards."""

from collections.abc import Mapping
from typing import Any

from cai_cli.common import console


def table(title: str, values: Mapping[str, Any]) -> str:
    """A two-column Markdown table under a heading; nothing of nothing."""
    if not values:
        return ""
    rows = "".join(f"| {cell(name)} | {cell(value)} |\n" for name, value in values.items())
    return (f"### {title}\n\n" if title else "") + f"| | |\n|---|---|\n{rows}".rstrip()


def cell(value: Any) -> str:
    """A value inside a Markdown table: one line, and no bar, markup or control character of its own."""
    text = f"{value:.6g}" if isinstance(value, float) else console.safe(str(value))
    for mark in "\\|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
