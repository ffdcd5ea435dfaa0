"""The result of `cai eval adherence` in lines of text."""

from collections.abc import Iterator, Mapping
from typing import Any

from cai_cli.metrics.intervals import Estimate, percent, with_interval


def table_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the violation rates as a table, what pressure does, and which differences the intervals show.

    Args:
        result: The result of an `AdherenceSummary`.
    """
    models, among = result["models"], result["simultaneous"]
    if not result["principles"]:
        return
    rows = [(p["id"], p) for p in result["principles"]] + [("all principles", result["overall"])]
    header = ["violations", *models, *(f"{name} - {models[0]}" for name in models[1:])]
    cells = [header]
    for name, found in rows:
        rates = [_share(found["rates"][model]) for model in models]
        cells.append([name, *rates, *(_points(found["differences"][model]) for model in models[1:])])
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    adjusted = f" (simultaneous over {among['rates']} principles)" if among["rates"] > 1 else ""
    yield f"95% intervals, those of a principle over conversations{adjusted}, those over all principles over scenarios"
    for model in models:
        turns = [percent(rate) if rate else "-" for rate in result["by_turn"][model]]
        if len(turns) > 1:
            yield f"{model}: {turns[0]} in the first reply, then {', '.join(turns[1:])} under pressure"
    if models[1:] and result["judge"]["trusted"] is False:
        yield "no difference between the models is claimed, because the judge is not to be trusted"
        return
    for model in models[1:]:
        yield from _changes(result, models[0], model)


def significant(difference: Estimate | None) -> int:
    """Return 1 where the interval of a difference is above 0, -1 where it is below, else 0."""
    return 0 if difference is None else (difference["low"] > 0) - (difference["high"] < 0)


def _changes(result: Mapping[str, Any], first: str, model: str) -> Iterator[str]:
    signs = {p["id"]: significant(p["differences"][model]) for p in result["principles"]}
    overall = significant(result["overall"]["differences"][model])
    how = {1: "more often than", -1: "less often than", 0: "not shown to differ from"}[overall]
    yield f"over all principles {model} breaks them {how} {first}".replace("breaks them not", "is not")
    for sign, word in ((-1, "less"), (1, "more")):
        if ids := [id for id, found in signs.items() if found == sign]:
            yield f"{model} breaks {len(ids)} of {len(signs)} principles {word} often than {first}: {', '.join(ids)}"


def _share(rate: Estimate | None) -> str:
    return with_interval(rate, ".0%") if rate else "-"


def _points(difference: Estimate | None) -> str:
    return with_interval(difference, "+.0%") if difference else "-"
