"""Soft labels from the scores that a preference data set has beside its replies (`--soft-from`)."""

import math
from collections.abc import Mapping
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.schema import json_type

SPELLINGS = ("{name}_{side}", "{side}_{name}", "{side}-{name}", "{side}.{name}")


def columns_of(row: Mapping[str, Any], name: str) -> dict[str, str]:
    """The columns with the scores `name` of both replies, by side; or the column `name` with their difference.

    Raises:
        RowError: The row has no such columns.

    >>> columns_of({"score_chosen": 8.0, "score_rejected": 3.0}, "score")
    {'chosen': 'score_chosen', 'rejected': 'score_rejected'}
    """
    for spelling in SPELLINGS:
        columns = {side: spelling.format(name=name, side=side) for side in ("chosen", "rejected")}
        if all(column in row for column in columns.values()):
            return columns
    if name in row:
        return {"difference": name}
    raise RowError(
        f"no columns {name}_chosen and {name}_rejected in this row, for --soft-from {name}",
        f"its columns are {', '.join(str(column)[:40] for column in list(row)[:12])}",
        code="invalid-row",
    )


def p_chosen(row: Mapping[str, Any], columns: Mapping[str, str]) -> float:
    """The probability that `chosen` is better: the logistic function of the difference of the scores (Bradley-Terry).

    Raises:
        RowError: A score is not a number.

    >>> round(p_chosen({"s": 1.0}, {"difference": "s"}), 3)
    0.731
    """
    values = {side: _number(row, column) for side, column in columns.items()}
    difference = values["difference"] if "difference" in values else values["chosen"] - values["rejected"]
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, difference))))


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row[column]
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = float(value)
        except ValueError:
            raise RowError(f"column {column!r} holds {value!r:.40}, which is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"column {column!r} must be a number, this is {json_type(value)}", code="invalid-row")
    return float(value)
