"""Prints a ranking of principles as a table (`cai principles rank`, `cai principles learn`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.common import console
from cai_cli.metrics.intervals import Estimate, fewest_clusters, with_interval

PANELS = {"judges": "other judges", "principles": "the other principles of the same judge, which share its habits"}
COLUMNS = ("principle", "pairs", "human", "panel", "flips", "log loss saved", "accuracy added")


def ranking_lines(ranking: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a ranking (`principle_ranking.PrincipleRanking.result`): the table, and how to read it."""
    principles = ranking["principles"]
    yield f"{ranking['pairs']:,} pairs of {ranking['prompts']:,} prompts, {len(principles):,} principles"
    rows = [COLUMNS, *(tuple(_cells(principle)) for principle in principles)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    yield _aligned(COLUMNS, widths) + "  finding"
    for row, principle in zip(rows[1:], principles, strict=True):
        yield f"{_aligned(row, widths)}  {_finding(principle)}"
    yield from _notes(ranking)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


def _cells(principle: Mapping[str, Any]) -> Iterator[str]:
    yield console.safe(principle["id"])
    yield f"{principle['pairs']:,}"
    for share in ("agreement_human", "agreement_panel", "flip_rate"):
        yield _interval(principle[share], ".0%")
    yield _interval(principle["log_loss_saved"], "+.3f")
    yield _interval(principle["accuracy_added"], "+.1%")


def _interval(estimate: Estimate | None, form: str) -> str:
    return with_interval(estimate, form) if estimate else "-"


def _finding(principle: Mapping[str, Any]) -> str:
    finding = str(principle["finding"])
    if finding == "not shown":
        finding += f" ({principle['reason']})"
    return finding + ("; single answers follow the position" if principle["position_decides"] else "")


def _notes(ranking: Mapping[str, Any]) -> Iterator[str]:
    reference, principles = ranking["reference"], ranking["principles"]
    among = ranking["simultaneous"]
    if reference is None:
        yield "nothing to compare with: give human labels (--human) or other judges (--panel),"
        yield "or label in both orders under several principles (--principles-per-pair)"
        return
    if among > 1:
        yield f"the 95% intervals of a column are simultaneous over all {among:,} principles"
    yield f"the finding is about the {reference} labels; a claim needs {fewest_clusters(among)} prompts or more"
    if ranking["panel"]:
        yield f"panel: {PANELS[ranking['panel']]}"
    if not any(principle["log_loss_saved"] for principle in principles):
        if reference == "panel" and ranking["panel"] == "principles":
            yield "information added is not measured: it needs human labels or other judges (--panel)"
        else:
            yield "information added is not measured: it needs labels by two or more principles (--principles-per-pair)"
