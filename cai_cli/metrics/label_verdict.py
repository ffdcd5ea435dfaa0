"""Describes an audit of labels in sentences: whether the labels can be trusted, and further findings."""

from typing import Any

from cai_cli.common import console
from cai_cli.metrics.intervals import Estimate, fewest_clusters, percent, with_interval
from cai_cli.metrics.order_agreement import FEWEST_PROMPTS


def trust(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    """Return whether the labels can be trusted (None: unknown) and the reason in one sentence.

    Agreement with humans decides where it is known. Otherwise labels are not trusted unless the two orders show that
    the judge reads the replies; where they do, it remains unknown whether the labels agree with humans.

    Args:
        metrics: The metrics of `label_audit.audit`.
    """
    if not metrics["pairs"] - metrics["tied_labels"]:
        if ties := metrics["ties"]:
            return False, f"no pair got a preference: {ties:,} {'tie' if ties == 1 else 'ties'}"
        return None, "there are no votes to audit"
    agreement = metrics["agreement"]
    if not agreement:
        return _trust_without_humans(metrics)
    return _trust_by_humans(agreement, metrics["labelled_prompts"])


def _trust_by_humans(agreement: Estimate, prompts: int) -> tuple[bool | None, str]:
    finding = f"the judge agrees with humans on {percent(agreement)} of {agreement['n']:,} labelled pairs"
    if agreement["low"] > 0.5:
        return True, finding
    if agreement["high"] < 0.5:
        return False, f"{finding}, which is worse than chance"
    if prompts < (needed := fewest_clusters(1)):
        return None, f"{finding}; {needed} or more prompts with human labels are needed for a result"
    return False, f"{finding}, which cannot be distinguished from chance"


def _trust_without_humans(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    reads, finding = reads_replies(metrics)
    if reads is False:
        return False, finding
    if reads is None:
        return None, f"agreement is unknown: there are no human labels, and {finding}"
    return None, f"agreement is unknown without human labels; {finding}"


def reads_replies(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    """Return whether the votes show that the judge reads the replies (None: not testable) and the finding in words.

    Args:
        metrics: The metrics of `label_audit.audit`, except `reads_replies`.
    """
    if 0 < (prompts := metrics["both_orders_prompts"]) < FEWEST_PROMPTS:
        few = "1 prompt is" if prompts == 1 else f"{prompts} prompts are"
        return None, f"{few} too few to show whether the judge reads the replies"
    if metrics["between_orders"]:
        return _reads_by_log_odds(metrics)
    if metrics["flip_rate"] and metrics["flip_excess"]:
        return _reads_by_flips(metrics["flip_rate"], metrics["flip_excess"])
    first_picks = metrics["first_picks"]
    if first_picks and _is_biased(first_picks):
        return False, f"the judge saw one order only, and picks the first reply in {percent(first_picks)} of votes"
    if metrics["unjudged"]:
        return None, "no judge compared the replies: the labels follow from how the replies were sampled"
    return None, "the judge saw one order only"


def _reads_by_log_odds(metrics: dict[str, Any]) -> tuple[bool | None, str]:
    correlation: Estimate = metrics["between_orders"]
    finding = f"the judge's preferences in the two orders have a correlation of {with_interval(correlation)}"
    if correlation["low"] > 0:
        return True, f"{finding} (a judge that does not read the replies: 0)"
    if correlation["high"] < 0:
        position, preference = metrics["position_spread"]["value"], metrics["preference_spread"]["value"]
        return False, (
            "nothing shows that the judge reads the replies: its position bias differs from pair to pair by more than "
            f"it prefers one reply (in log-odds, a standard deviation of {position:.2g} and a root mean square of "
            f"{preference:.2g})"
        )
    return False, f"{finding}, like a judge that does not read them (0)"


def _reads_by_flips(flip_rate: Estimate, flip_excess: Estimate) -> tuple[bool, str]:
    blind = flip_rate["value"] - flip_excess["value"]
    finding = f"the judge's preference flips with the order of the replies on {percent(flip_rate)} of pairs"
    if flip_excess["high"] < 0:
        return True, f"{finding} (a judge that does not read them: {blind:.0%})"
    return False, f"{finding}, like a judge that does not read them ({blind:.0%})"


def _is_biased(share: Estimate) -> bool:
    return not share["low"] <= 0.5 <= share["high"]


def notes(metrics: dict[str, Any]) -> list[str]:
    """Return further findings, one sentence each.

    Args:
        metrics: The metrics of `label_audit.audit`.
    """
    sentences = []
    if metrics["agreement"] and (metrics["between_orders"] or metrics["flip_rate"]):
        sentences.append(reads_replies(metrics)[1])
    if first := metrics["first_picks"]:
        sentences.append(
            f"the judge picks the first reply in {percent(first)} of {first['n']:,} votes"
            + ("" if _is_biased(first) else " (a judge without position bias: 50%)")
        )
    if metrics["between_orders"]:
        position, preference = metrics["position_log_odds"]["value"], metrics["preference_spread"]["value"]
        sentences.append(
            f"the position adds {position:.2g} to the log-odds of the first reply; the preferences between replies, "
            f"noise included, have a root mean square of {preference:.2g}"
        )
    elif (content := metrics["content"]) and metrics["position"]:
        position, noise = abs(metrics["position"]["value"]), metrics["noise"]["value"]
        shares = f"the replies decide {percent(content)} of the judge's answers, the position {position:.1%}"
        sentences.append(f"{shares}, chance {noise:.1%}")
    if ties := metrics["tied_labels"]:
        sentences.append(f"{ties:,} of {metrics['pairs']:,} labels are ties, in which neither reply is preferred")
    if (longer := metrics["longer_chosen"]) and _is_biased(longer):
        sentences.append(f"the longer reply is chosen in {percent(longer)} of pairs of unequal length")
    if metrics["repeated"]:
        sentences.append(f"{metrics['repeated']:,} rows repeat the id of an earlier row; they are counted as well")
    if failures := sum(metrics["rejected"].values()):
        rejected_ties = metrics["ties"] - metrics["tied_labels"]
        besides = f" besides the {rejected_ties:,} ties" if rejected_ties else ""
        sentences.append(f"{failures:,} pairs{besides} have no label; see their reasons")
    return sentences


def print_verdict(audit: dict[str, Any]) -> None:
    """Print the verdict and the notes of an audit on stderr; labels that cannot be trusted give a warning."""
    if audit["trusted"] is False:
        console.warn(f"do not trust these labels: {audit['reason']}")
    else:
        console.say(f"labels: {audit['reason']}")
    for note in audit["notes"]:
        console.say(f"labels: {note}")
