"""The audit of preference labels before anything is trained on them (`cai eval agreement`; paper section 2).

The paper first measures its feedback models against human comparisons. The audit does so where human labels exist. It
also audits the votes that `cai label-prefs` keeps: comparing the two orders shows whether a judge reads the replies,
even without human labels.

For answers in log-odds the audit tests whether what the judge prefers in one order agrees with what it prefers in the
other, whatever its position bias (`between_orders`; see `order_agreement`).

For judgements in words (method `verdict`) it compares winners. The model of a judge: it answers a share `position` of
the questions by position alone (negative: the second position), a share `noise` at random, and the rest, `content`, by
the replies. With q the share of first-position picks and f the share of pairs whose winner changes with the order,
position = 2q - 1 and content = sqrt(1 + position^2 - 2f). A judge with content = 0 flips on (1 + position^2) / 2 of the
pairs; `flip_excess` is f less that share, and is negative for a judge that reads the replies. These metrics are also
given for log-odds, where they describe single answers and not the labels: a position bias that decides both answers
about a pair cancels in their mean.

Metrics of the labels (agreement, calibration, length) are computed over the file. Metrics of the judge (order,
position) also cover the pairs that were rejected with their votes. A vote of exactly one half has no winner and is left
out; a label of exactly one half is a tie, and counts as half right. Pairs that only humans judged are counted and
otherwise ignored. Every interval is computed over prompts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cai_cli.common.hash_index import KeyTable
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import TIE, Preference, Rejected, Vote, conversation_id, reason_kind, with_votes
from cai_cli.metrics.calibration import BINS, bin_ends, bin_of, error_if_calibrated
from cai_cli.metrics.intervals import SHARE, ClusterBootstrap, Estimate, widened
from cai_cli.metrics.label_verdict import notes, reads_replies, trust
from cai_cli.metrics.order_agreement import (
    LARGEST_LOG_ODDS,
    ORDER_SUMS,
    between_orders,
    fisher_interval,
    order_sums,
    position_variance,
)
from cai_cli.runtime.output_files import sidecar

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

AuditMetrics = dict[str, Any]
SIGNED = (-1.0, 1.0)


class BinSum(NamedTuple):
    """A sum over the labels with a human verdict whose p_chosen lies in one bin."""

    quantity: Literal["n", "confidence", "right"]
    bin: int


Sum = str | BinSum
PAIR_SUMS: Sequence[Sum] = (
    *("pairs", "ties", "human", "right", "unequal", "longer", "xx", "xy", "yy"),
    *("principle_pairs", "principles_agree"),
    *(BinSum(name, k) for k in range(BINS) for name in ("n", "confidence", "right")),
)
# `picks`: votes with a winner; `firsts`: those for the first reply; `both_orders`: pairs with a winner in each order.
WINNER_SUMS = ("votes", "p_first", "picks", "firsts", "both_orders", "flips", "firsts_of_both_orders")
VOTE_SUMS: Sequence[Sum] = (*WINNER_SUMS, *ORDER_SUMS)
PRINCIPLE_SUMS: Sequence[Sum] = (*WINNER_SUMS, "pairs", "human", "right")


def audit(rows: Iterable[Preference], rejected: Iterable[Rejected] = ()) -> AuditMetrics:
    """Return the audit of labels. Memory: 12 to 36 bytes a row, and as much a prompt.

    Args:
        rows: The labels with their votes.
        rejected: The rejected pairs, with their votes where they have any.

    Returns:
        `trusted` (true, false, or null for unknown), `reason` in one sentence, `reads_replies` (whether the votes show
        that the judge reads the replies; null where that cannot be tested), the metrics by name, each with its 95%
        interval, and `notes` in sentences.

    Examples:
        >>> result = audit([])
        >>> result["trusted"], result["reason"], result["agreement"]
        (None, 'there are no votes to audit', None)
    """
    label_audit = LabelAudit()
    for row in rows:
        label_audit.add(row)
    for rejected_row in rejected:
        label_audit.add(rejected_row)
    return label_audit.audit()


class LabelAudit:
    """Collects, row by row, the sums by prompt from which the audit is computed."""

    def __init__(self) -> None:
        self.prompts, self.ids, self.rows = KeyTable(), KeyTable(), 0
        self.pairs, self.votes = ClusterBootstrap(PAIR_SUMS), ClusterBootstrap(VOTE_SUMS)
        self.principles: dict[str, ClusterBootstrap[Sum]] = {}
        self.human_only = 0
        self.unjudged = 0
        self.reasons: Counter[str] = Counter()

    def _prompt(self, row: Preference) -> int:
        return self.prompts.number(conversation_id(row.prompt))

    def add(self, row: Preference | Rejected) -> None:
        """Add a label with its votes, or a rejected pair."""
        self.rows += 1
        self.ids.add(row.key, self.rows)
        if isinstance(row, Rejected):
            self._add_rejected(row)
        elif row.votes:
            self._add_label(row)
        else:
            self.human_only += 1

    def _add_label(self, row: Preference) -> None:
        prompt = self._prompt(row)
        self.unjudged += all(vote.method == "unjudged" for vote in row.votes)
        by_principle = self._add_votes(prompt, row)
        agreement = _principle_agreement_sums(by_principle.values())
        tie = row.p_chosen == 0.5
        self.pairs.add(prompt, {"pairs": 1, "ties": tie, **_label_sums(row), **_length_sums(row), **agreement})
        for principle, p_chosen in by_principle.items():
            if row.human:
                right = win_or_half(p_chosen if row.human == "chosen" else 1 - p_chosen)
                self.principles[principle].add(prompt, {"human": 1, "right": right})

    def _add_rejected(self, rejected: Rejected) -> None:
        """Count a rejected pair by its reason, and its votes, where it has any, for the judge."""
        self.reasons[reason_kind(rejected.reason)] += 1
        if row := with_votes(rejected):
            self._add_votes(self._prompt(row), row)

    def _add_votes(self, prompt: int, row: Preference) -> dict[str, float]:
        """Add the votes on one pair; return the mean probability of `chosen` by principle."""
        by_principle = votes_by_principle(row.votes)
        self.votes.add(prompt, dict[Sum, float](order_sums(by_principle.values()).items()))
        for principle, votes in by_principle.items():
            sums = winner_sums(votes)
            self.votes.add(prompt, sums)
            self.principles.setdefault(principle, ClusterBootstrap(PRINCIPLE_SUMS)).add(prompt, {"pairs": 1, **sums})
        return {principle: mean_for_chosen(votes) for principle, votes in by_principle.items()}

    def audit(self) -> AuditMetrics:
        """Return the audit of the rows added so far, as the function `audit` does."""
        metrics = self._metrics()
        trusted, reason = trust(metrics)
        reads, _ = reads_replies(metrics)
        return {"trusted": trusted, "reason": reason, "reads_replies": reads, **metrics, "notes": notes(metrics)}

    def _metrics(self) -> AuditMetrics:
        pairs, votes = self.pairs, self.votes
        return {
            "pairs": round(pairs.total("pairs")),
            "votes": round(votes.total("votes")),
            "human_only": self.human_only,
            "unjudged": self.unjudged,
            "repeated": self.rows - self.ids.size,
            "ties": round(pairs.total("ties")) + self.reasons[TIE],
            "tied_labels": round(pairs.total("ties")),
            "rejected": {why: n for why, n in sorted(self.reasons.items()) if why != TIE},
            "agreement": pairs.share("right", "human"),
            "calibration_error": pairs.estimate(_calibration_error, "human", SHARE),
            "calibration_error_if_calibrated": _error_if_calibrated(pairs),
            "reliability": list(_reliability(pairs)),
            "both_orders_prompts": votes.clusters("both_orders"),
            "labelled_prompts": pairs.clusters("human"),
            "between_orders": between_orders(votes),
            **_log_odds_metrics(votes),
            "flip_rate": votes.share("flips", "both_orders"),
            "flip_excess": _flip_excess_estimate(votes),
            "first_picks": votes.share("firsts", "picks"),
            "mean_p_first": votes.estimate(lambda s: s["p_first"] / s["votes"], "votes", SHARE),
            "position": votes.estimate(lambda s: 2 * s["firsts"] / s["picks"] - 1, "picks", SIGNED),
            "noise": votes.estimate(_noise, "both_orders", SHARE),
            "content": _content_estimate(votes),
            "between_principles": pairs.share("principles_agree", "principle_pairs"),
            "longer_chosen": pairs.share("longer", "unequal"),
            "length_correlation": pairs.estimate(_length_correlation, "pairs", SIGNED),
            "principles": {
                name: _principle_metrics(self.principles[name], len(self.principles))
                for name in sorted(self.principles)
            },
        }


# --- sums of one pair ---------------------------------------------------------------------------------------------


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def votes_by_principle(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    groups: dict[str, list[Vote]] = {}
    for vote in votes:
        groups.setdefault(vote.principle_id, []).append(vote)
    return groups


def flips(votes: Iterable[Vote]) -> list[bool]:
    """Return, for each principle judged in both orders, whether the winner changed with the order.

    Args:
        votes: The votes on one pair. A mean of one half in either order has no winner, and its principle is left out.

    Examples:
        >>> def vote(order, p_first):
        ...     return Vote(principle_id="kind", method="choice", order=order, p_first=p_first, rationale=None)
        >>> flips([vote("ab", 0.9), vote("ba", 0.8)]), flips([vote("ab", 0.9), vote("ba", 0.2)])
        ([True], [False])
    """
    sums = map(winner_sums, votes_by_principle(votes).values())
    return [bool(s["flips"]) for s in sums if "both_orders" in s]


def mean_for_chosen(votes: Sequence[Vote]) -> float:
    """Return the mean probability of `chosen`, each order weighted equally: one order may lack some rationales."""
    orders = ([_vote_for_chosen(v) for v in votes if v.order == order] for order in ("ab", "ba"))
    return _mean(_mean(order) for order in orders if order)


def _vote_for_chosen(vote: Vote) -> float:
    return vote.p_first if vote.order == "ab" else 1 - vote.p_first


def win_or_half(p: float) -> float:
    """1 where the first is preferred with probability `p` above one half, 0 below it, and 0.5 for a tie."""
    return 0.5 if p == 0.5 else float(p > 0.5)


def winner_sums(votes: Sequence[Vote]) -> dict[Sum, float]:
    """Return the sums of one principle's votes on one pair; votes of one order (sampled rationales) are averaged."""
    # Replies that are scored alone (contrast), or that no judge compared (unjudged), have no position to prefer.
    decided = [vote.p_first for vote in votes if vote.p_first != 0.5 and vote.method not in ("contrast", "unjudged")]
    sums: dict[Sum, float] = {
        "votes": len(votes),
        "p_first": math.fsum(vote.p_first for vote in votes),
        "picks": len(decided),
        "firsts": sum(p > 0.5 for p in decided),
    }
    both = [[v.p_first for v in votes if v.order == order] for order in ("ab", "ba")]
    if all(both):
        first, second = map(_mean, both)
        if first != 0.5 and second != 0.5:
            sums["both_orders"] = 1
            sums["flips"] = (first > 0.5) == (second > 0.5)
            sums["firsts_of_both_orders"] = (first > 0.5) + (second > 0.5)
    return sums


def _label_sums(row: Preference) -> dict[Sum, float]:
    if row.human is None:
        return {}
    k = bin_of(row.p_chosen)
    right = 0.5 if row.p_chosen == 0.5 else float(row.human == "chosen")
    in_bin: dict[Sum, float] = {BinSum("n", k): 1, BinSum("confidence", k): row.p_chosen, BinSum("right", k): right}
    return {"human": 1, "right": right, **in_bin}


def _length_sums(row: Preference) -> dict[Sum, float]:
    """Return the sums about reply lengths in characters.

    x is the log of the ratio of lengths and y is 2 p_chosen - 1. Both change sign when the two replies are exchanged,
    so their correlation is taken about zero.
    """
    chosen, rejected = len(row.chosen[0].content), len(row.rejected[0].content)
    x, y = math.log((chosen + 1) / (rejected + 1)), 2 * row.p_chosen - 1
    unequal = chosen != rejected and row.p_chosen != 0.5
    return {"unequal": unequal, "longer": unequal and chosen > rejected, "xx": x * x, "xy": x * y, "yy": y * y}


def _principle_agreement_sums(p_chosen: Iterable[float]) -> dict[Sum, float]:
    """Return how many pairs of principles have a winner each, and how many of those agree on it."""
    decided = [p > 0.5 for p in p_chosen if p != 0.5]
    chosen, n = sum(decided), len(decided)
    return {
        "principle_pairs": n * (n - 1) // 2,
        "principles_agree": chosen * (chosen - 1) // 2 + (n - chosen) * (n - chosen - 1) // 2,
    }


# --- metrics of sums ----------------------------------------------------------------------------------------------


def _preference_spread(s: "Mapping[Sum, Numbers]") -> "Numbers":
    return (s["preference_squares"] / s["ordered"]) ** 0.5


def _log_odds_metrics(votes: ClusterBootstrap[Sum]) -> dict[str, Any]:
    """Return the mean and the standard deviation of the position part, and the root mean square of the preference."""
    signed, spread = (-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS), (0.0, LARGEST_LOG_ODDS)
    # The variance is unbiased: that of two opposite extremes is twice their square.
    position_spread = (0.0, 2**0.5 * LARGEST_LOG_ODDS)
    return {
        "position_log_odds": votes.estimate(lambda s: s["position"] / s["ordered"], "ordered", signed),
        "position_spread": votes.estimate(lambda s: position_variance(s) ** 0.5, "ordered", position_spread),
        "preference_spread": votes.estimate(_preference_spread, "ordered", spread),
    }


def _twice_blind_flip_rate(s: "Mapping[Sum, Numbers]") -> "Numbers":
    """Return twice the flip rate of a judge that has the same position bias and does not read the replies."""
    return 1 + (s["firsts_of_both_orders"] / s["both_orders"] - 1) ** 2


def _flip_excess(s: "Mapping[Sum, Numbers]") -> "Numbers":
    return s["flips"] / s["both_orders"] - _twice_blind_flip_rate(s) / 2


def _flip_excess_estimate(votes: ClusterBootstrap[Sum]) -> Estimate | None:
    """Return the flip excess with its 95% interval over prompts.

    The excess is -(1 - position^2) / 2 times the intraclass correlation of the winners in the two orders, and its
    interval covers Fisher's interval of that.
    """
    excess = votes.estimate(_flip_excess, "both_orders", SIGNED)
    if excess is None:
        return None
    position = votes.total("firsts_of_both_orders") / votes.total("both_orders") - 1
    scale = (1 - position * position) / 2
    if scale <= 0:  # every pick is of the same position
        return excess
    ends = fisher_interval({**excess, "value": -excess["value"] / scale})
    return widened(excess, {**excess, "low": -scale * ends["high"], "high": -scale * ends["low"]})


def _content_estimate(votes: ClusterBootstrap[Sum]) -> Estimate | None:
    """Return the share that the replies decide, sqrt(-2 * flip excess), whose interval covers that of the excess."""
    content, excess = votes.estimate(_content, "both_orders", SHARE), _flip_excess_estimate(votes)
    if content is None or excess is None:
        return content
    low, high = (min(1.0, max(0.0, -2 * end) ** 0.5) for end in (excess["high"], excess["low"]))
    return widened(content, {**content, "low": low, "high": high})


def _content(s: "Mapping[Sum, Numbers]") -> "Numbers":
    return (_twice_blind_flip_rate(s) - 2 * s["flips"] / s["both_orders"]).clip(0) ** 0.5


def _noise(s: "Mapping[Sum, Numbers]") -> "Numbers":
    return (1 - abs(s["firsts_of_both_orders"] / s["both_orders"] - 1) - _content(s)).clip(0)


def _calibration_error(s: "Mapping[Sum, Numbers]") -> "Numbers":
    """Return the expected calibration error: the mean distance between confidence and share right, over bins."""
    gaps: Any = sum(abs(s[BinSum("confidence", k)] - s[BinSum("right", k)]) for k in range(BINS))
    return gaps / s["human"]  # type: ignore[no-any-return]


def _error_if_calibrated(pairs: ClusterBootstrap[Sum]) -> float | None:
    """Return the mean calibration error of a calibrated judge of the same pairs; None without human labels."""
    import numpy as np

    if not (n := pairs.total("human")):
        return None
    gaps = [pairs.by_cluster(BinSum("confidence", k)) - pairs.by_cluster(BinSum("right", k)) for k in range(BINS)]
    return error_if_calibrated(np.stack(gaps, axis=1), n)


def _reliability(pairs: ClusterBootstrap[Sum]) -> Iterator[dict[str, Any]]:
    """Yield the reliability curve: for each bin with labels, the mean confidence and the share right.

    The intervals of the bins are simultaneous.
    """
    bins = [k for k in range(BINS) if pairs.total(BinSum("n", k))]
    for k in bins:
        n = round(pairs.total(BinSum("n", k)))
        confidence = pairs.total(BinSum("confidence", k)) / n
        right = pairs.share(BinSum("right", k), BinSum("n", k), len(bins))
        yield {**bin_ends(k), "n": n, "confidence": confidence, "right": right}


def _length_correlation(s: "Mapping[Sum, Numbers]") -> "Numbers":
    return s["xy"] / (s["xx"] * s["yy"]) ** 0.5


def _principle_metrics(sums: ClusterBootstrap[Sum], principles: int) -> dict[str, Any]:
    """Return the metrics of one of several principles; each metric's intervals are simultaneous over principles."""
    return {
        "pairs": round(sums.total("pairs")),
        "agreement": sums.share("right", "human", principles),
        "mean_p_first": sums.estimate(lambda s: s["p_first"] / s["votes"], "votes", SHARE, principles),
        "flip_rate": sums.share("flips", "both_orders", principles),
    }


def audit_file(source: str) -> AuditMetrics:
    """Return the audit of a file of Preference rows and of the rejected rows beside it.

    Args:
        source: Path of the file, or `-` for stdin.

    Raises:
        InvalidRow: A line is not a valid row.
        CaiError: A file cannot be read.
    """
    rows = (row for _, row in read_rows(source, rows_of(Preference)))
    rejected_file = sidecar(Path(source), "rejected.jsonl")
    rejected: Iterable[Rejected] = ()
    if source != "-" and rejected_file.exists():
        rejected = (row for _, row in read_rows(str(rejected_file), rows_of(Rejected)))
    return audit(rows, rejected)
