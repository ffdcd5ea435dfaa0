"""Describes an audit of labels in sentences: whether the labels can be trusted, and further findings."""

from typing import Any

from cai_cli.common import console
from cai_cli.metrics.intervals import Estimate, percent


def trust(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    """Return whether the labels can be trusted (None: unknown) and the reason in one sentence.

    Agreement with humans decides where it is known; otherwise whether the answers depend on the replies at all.

    Args:
        metrics: The metrics of `label_audit.audit`.
    """
    if not metrics["pairs"]:
        if ties := metrics["ties"]:
            return False, f"no pair got a preference: {ties:,} {'tie' if ties == 1 else 'ties'}"
        return None, "there are no votes to audit"
    agreement = metrics["agreement"]
    if not agreement:
        return _trust_without_humans(metrics["flip_rate"], metrics["flip_excess"], metrics["first_picks"])
    finding = f"the judge agrees with humans on {percent(agreement)} of {agreement['n']:,} labelled pairs"
    if agreement["low"] > 0.5:
        return True, finding
    below = agreement["high"] < 0.5
    return False, f"{finding}, which {'is worse than' if below else 'cannot be distinguished from'} chance"


def _trust_without_humans(
    flip_rate: Estimate | None, flip_excess: Estimate | None, first_picks: Estimate | None
) -> tuple[bool | None, str]:
    if flip_rate and flip_excess:
        blind = flip_rate["value"] - flip_excess["value"]
        finding = f"the judge's preference flips with the order of the replies on {percent(flip_rate)} of pairs"
        if flip_excess["high"] < 0:
            expected = f"a judge that does not read them: {blind:.0%}"
            return None, f"agreement is unknown without human labels; {finding} ({expected})"
        return False, f"{finding}, like a judge that does not read them ({blind:.0%})"
    if first_picks and _is_biased(first_picks):
        return False, f"the judge saw one order only, and picks the first reply in {percent(first_picks)} of votes"
    return None, "agreement is unknown: there are no human labels, and the judge saw one order only"


def _is_biased(share: Estimate) -> bool:
    return not share["low"] <= 0.5 <= share["high"]


def notes(metrics: dict[str, Any]) -> list[str]:
    """Return further findings, one sentence each.

    Args:
        metrics: The metrics of `label_audit.audit`.
    """
    sentences = []
    if first := metrics["first_picks"]:
        sentences.append(
            f"the judge picks the first reply in {percent(first)} of {first['n']:,} votes"
            + ("" if _is_biased(first) else ", which shows no position bias")
        )
    if content := metrics["content"]:
        position, noise = abs(metrics["position"]["value"]), metrics["noise"]["value"]
        shares = f"the replies decide {percent(content)} of the judge's answers, the position {position:.1%}"
        sentences.append(f"{shares}, chance {noise:.1%}")
    if (longer := metrics["longer_chosen"]) and _is_biased(longer):
        sentences.append(f"the longer reply is chosen in {percent(longer)} of pairs of unequal length")
    if metrics["repeated"]:
        sentences.append(f"{metrics['repeated']:,} rows repeat the id of an earlier row; they are counted as well")
    if failures := sum(metrics["rejected"].values()):
        sentences.append(f"{failures:,} pairs besides the {metrics['ties']:,} ties have no label; see their reasons")
    return sentences


def print_verdict(audit: dict[str, Any]) -> None:
    """Print the verdict and the notes of an audit on stderr; labels that cannot be trusted give a warning."""
    if audit["trusted"] is False:
        console.warn(f"do not trust these labels: {audit['reason']}")
    else:
        console.say(f"labels: {audit['reason']}")
    for note in audit["notes"]:
        console.say(f"labels: {note}")
