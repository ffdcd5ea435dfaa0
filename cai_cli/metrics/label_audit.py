"""`cai eval agreement`: what labels are worth before anything is trained on them (paper section 2).

The paper measures its feedback models against human comparisons first. Here the votes that `cai label-prefs` keeps are
audited as well: a judge that does not read the replies shows in its two orders even where no human label is at hand.

Order. Say a judge answers a share `position` of the asks by place alone (negative: the second place), a share `noise`
by a fair coin, and the rest, `content`, by the replies. With q the share of first-position picks and f the share of
pairs whose winner changes with the order, position = 2q - 1 and content = sqrt(1 + position^2 - 2f). A judge without
content flips on (1 + position^2) / 2 of the pairs; `flip_excess` is f less that, and lies under zero for a judge that
reads.

What describes the labels (agreement, calibration, length) is counted over the file; what describes the judge (order,
position) also over the pairs that were rejected with their votes: a tie is often a flip. A vote of exactly one half
names no winner and is left out; a label of exactly one half is half right. Pairs that only humans judged are counted
and left alone. Every interval is a bootstrap over prompts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import TIE, Preference, Rejected, Vote, conversation_id, reason_kind, with_votes
from cai_cli.metrics.intervals import SHARE, ClusterBootstrap, Estimate
from cai_cli.runtime.output_files import sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cai_cli.metrics.intervals import Numbers

AuditMetrics = dict[str, Any]
SIGNED = (-1.0, 1.0)
# The confidence in a label, p_chosen, by tenths from one half to one.
BINS = 5
BIN_SUMS = ("n", "confidence", "right")
PAIR_SUMS = (
    *("pairs", "human", "right", "unequal", "longer", "xx", "xy", "yy"),
    *("principle_pairs", "principles_agree"),
    *(f"{name}{k}" for k in range(BINS) for name in BIN_SUMS),
)
VOTE_SUMS = ("votes", "p_first", "picks", "firsts", "asked", "flips", "firsts_of_asked")
PRINCIPLE_SUMS = (*VOTE_SUMS, "pairs", "human", "right")


def audit(rows: Iterable[Preference], rejected: Iterable[Rejected] = ()) -> AuditMetrics:
    """Every figure of the votes on `rows`, whether the labels can be trusted (true, false, or null: not known) and
    the reason, in plain words. Memory: 12 to 36 bytes a row, and as much a prompt."""
    label_audit = LabelAudit()
    for row in rows:
        label_audit.add(row)
    for refused in rejected:
        label_audit.add(refused)
    return label_audit.audit()


class LabelAudit:
    """The sums that the figures are made of, by prompt, while rows come."""

    def __init__(self) -> None:
        self.prompts, self.ids, self.rows = KeyTable(), KeyTable(), 0
        self.pairs, self.votes = ClusterBootstrap(PAIR_SUMS), ClusterBootstrap(VOTE_SUMS)
        self.principles: dict[str, ClusterBootstrap] = {}
        self.human_only = 0
        self.reasons: Counter[str] = Counter()

    def _prompt(self, row: Preference) -> int:
        return self.prompts.number(conversation_id(row.prompt))

    def add(self, row: Preference | Rejected) -> None:
        """A label and its votes; or a pair that became none."""
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
        verdicts = self._add_votes(prompt, row)
        self.pairs.add(prompt, {"pairs": 1, **_label_sums(row), **_length_sums(row), **_between(verdicts.values())})
        for principle, p_chosen in verdicts.items():
            if row.human:
                right = _half_at_one_half(p_chosen if row.human == "chosen" else 1 - p_chosen)
                self.principles[principle].add(prompt, {"human": 1, "right": right})

    def _add_rejected(self, refused: Rejected) -> None:
        """Counted by reason; its votes, where it carries them, are the judge's too."""
        self.reasons[reason_kind(refused.reason)] += 1
        if row := with_votes(refused):
            self._add_votes(self._prompt(row), row)

    def _add_votes(self, prompt: int, row: Preference) -> dict[str, float]:
        """Principle -> the mean probability it gives to `chosen`."""
        by_principle = _by_principle(row.votes)
        for principle, votes in by_principle.items():
            sums = _vote_sums(votes)
            self.votes.add(prompt, sums)
            self.principles.setdefault(principle, ClusterBootstrap(PRINCIPLE_SUMS)).add(prompt, {"pairs": 1, **sums})
        return {principle: _verdict(votes) for principle, votes in by_principle.items()}

    def audit(self) -> AuditMetrics:
        """The figures of what was added."""
        found = self._figures()
        trusted, reason = _trust(found)
        return {"trusted": trusted, "reason": reason, **found, "notes": _notes(found)}

    def _figures(self) -> AuditMetrics:
        pairs, votes = self.pairs, self.votes
        return {
            "pairs": round(pairs.total("pairs")),
            "votes": round(votes.total("votes")),
            "human_only": self.human_only,
            "repeated": self.rows - self.ids.size,
            "ties": self.reasons[TIE],
            "rejected": {why: n for why, n in sorted(self.reasons.items()) if why != TIE},
            "agreement": pairs.share("right", "human"),
            "calibration_error": pairs.figure(_calibration_error, "human", SHARE),
            "reliability": list(_reliability(pairs)),
            "flip_rate": votes.share("flips", "asked"),
            "flip_excess": votes.figure(_flip_excess, "asked", SIGNED),
            "first_picks": votes.share("firsts", "picks"),
            "mean_p_first": votes.figure(lambda s: s["p_first"] / s["votes"], "votes", SHARE),
            "position": votes.figure(lambda s: 2 * s["firsts"] / s["picks"] - 1, "picks", SIGNED),
            "noise": votes.figure(_noise, "asked", SHARE),
            "content": votes.figure(_content, "asked", SHARE),
            "between_principles": pairs.share("principles_agree", "principle_pairs"),
            "longer_chosen": pairs.share("longer", "unequal"),
            "length_correlation": pairs.figure(_length_correlation, "pairs", SIGNED),
            "principles": {name: _principle_figures(self.principles[name]) for name in sorted(self.principles)},
        }


# --- sums of one pair ---------------------------------------------------------------------------------------------


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _by_principle(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.principle_id, []).append(vote)
    return found


def flips(votes: Iterable[Vote]) -> list[bool]:
    """Of each principle asked in both orders: whether the verdict changed with the order. One half is no verdict."""
    sums = map(_vote_sums, _by_principle(votes).values())
    return [bool(s["flips"]) for s in sums if "asked" in s]


def _verdict(votes: Sequence[Vote]) -> float:
    """The probability of `chosen`, each order counted once: of one some thoughts may have been refused."""
    orders = ([_for_chosen(v) for v in votes if v.order == order] for order in ("ab", "ba"))
    return _mean(_mean(order) for order in orders if order)


def _for_chosen(vote: Vote) -> float:
    return vote.p_first if vote.order == "ab" else 1 - vote.p_first


def _half_at_one_half(p: float) -> float:
    return 0.5 if p == 0.5 else float(p > 0.5)


def _vote_sums(votes: Sequence[Vote]) -> dict[str, float]:
    """Of one principle's votes on one pair; several votes in one order (sampled rationales) are one ask of it."""
    # A contrast is shown no two replies, so none of them is in a place that could be liked.
    decided = [vote.p_first for vote in votes if vote.p_first != 0.5 and vote.method != "contrast"]
    sums = {
        "votes": len(votes),
        "p_first": math.fsum(vote.p_first for vote in votes),
        "picks": len(decided),
        "firsts": sum(p > 0.5 for p in decided),
    }
    both = [[v.p_first for v in votes if v.order == order] for order in ("ab", "ba")]
    if all(both):
        first, second = map(_mean, both)
        if first != 0.5 and second != 0.5:
            sums["asked"] = 1
            sums["flips"] = (first > 0.5) == (second > 0.5)
            sums["firsts_of_asked"] = (first > 0.5) + (second > 0.5)
    return sums


def _label_sums(row: Preference) -> dict[str, float]:
    if row.human is None:
        return {}
    k = min(BINS - 1, int((row.p_chosen - 0.5) * 2 * BINS))
    right = 0.5 if row.p_chosen == 0.5 else float(row.human == "chosen")
    return {"human": 1, "right": right, f"n{k}": 1, f"confidence{k}": row.p_chosen, f"right{k}": right}


def _length_sums(row: Preference) -> dict[str, float]:
    """Lengths in characters. x: the log of the ratio of lengths, y: 2 p_chosen - 1; both change sign with the order
    in which the two replies are named, so their correlation is taken about zero."""
    chosen, rejected = len(row.chosen[0].content), len(row.rejected[0].content)
    x, y = math.log((chosen + 1) / (rejected + 1)), 2 * row.p_chosen - 1
    return {"unequal": chosen != rejected, "longer": chosen > rejected, "xx": x * x, "xy": x * y, "yy": y * y}


def _between(verdicts: Iterable[float]) -> dict[str, float]:
    """Over all pairs of principles that decided: how many agree."""
    decided = [p > 0.5 for p in verdicts if p != 0.5]
    chosen, n = sum(decided), len(decided)
    return {
        "principle_pairs": n * (n - 1) // 2,
        "principles_agree": chosen * (chosen - 1) // 2 + (n - chosen) * (n - chosen - 1) // 2,
    }


# --- figures of sums ----------------------------------------------------------------------------------------------


def _blind_flips_twice(s: "Mapping[str, Numbers]") -> "Numbers":
    return 1 + (s["firsts_of_asked"] / s["asked"] - 1) ** 2


def _flip_excess(s: "Mapping[str, Numbers]") -> "Numbers":
    return s["flips"] / s["asked"] - _blind_flips_twice(s) / 2


def _content(s: "Mapping[str, Numbers]") -> "Numbers":
    return (_blind_flips_twice(s) - 2 * s["flips"] / s["asked"]).clip(0) ** 0.5


def _noise(s: "Mapping[str, Numbers]") -> "Numbers":
    return (1 - abs(s["firsts_of_asked"] / s["asked"] - 1) - _content(s)).clip(0)


def _calibration_error(s: "Mapping[str, Numbers]") -> "Numbers":
    """Expected calibration error: the mean distance of confidence and share of right labels, by bins."""
    gaps: Any = sum(abs(s[f"confidence{k}"] - s[f"right{k}"]) for k in range(BINS))
    return gaps / s["human"]  # type: ignore[no-any-return]


def _reliability(pairs: ClusterBootstrap) -> Iterator[dict[str, Any]]:
    """The curve behind the calibration error: of each bin that holds labels, mean confidence and share right."""
    for k in range(BINS):
        if n := round(pairs.total(f"n{k}")):
            ends = {"from": (BINS + k) / (2 * BINS), "to": (BINS + k + 1) / (2 * BINS)}
            confidence = pairs.total(f"confidence{k}") / n
            yield {**ends, "n": n, "confidence": confidence, "right": pairs.share(f"right{k}", f"n{k}")}


def _length_correlation(s: "Mapping[str, Numbers]") -> "Numbers":
    return s["xy"] / (s["xx"] * s["yy"]) ** 0.5


def _principle_figures(sums: ClusterBootstrap) -> dict[str, Any]:
    return {
        "pairs": round(sums.total("pairs")),
        "agreement": sums.share("right", "human"),
        "mean_p_first": sums.figure(lambda s: s["p_first"] / s["votes"], "votes", SHARE),
        "flip_rate": sums.share("flips", "asked"),
    }


# --- in words -----------------------------------------------------------------------------------------------------


def _trust(found: AuditMetrics) -> tuple[bool | None, str]:
    """By agreement with humans where it is known; else by whether the answers depend on the replies at all."""
    if not found["pairs"]:
        ties = found["ties"]
        return (False, f"no pair has a preference: {ties:,} ties") if ties else (None, "there are no votes to judge by")
    agreement = found["agreement"]
    if not agreement:
        return _trust_without_humans(found["flip_rate"], found["flip_excess"], found["first_picks"])
    said = f"the judge agrees with the humans on {_said(agreement)} of {agreement['n']:,} labelled pairs"
    if agreement["low"] > 0.5:
        return True, said
    return False, f"{said}: " + ("worse than chance" if agreement["high"] < 0.5 else "that cannot be told from chance")


def _trust_without_humans(
    flips: Estimate | None, excess: Estimate | None, first: Estimate | None
) -> tuple[bool | None, str]:
    if flips and excess:
        blind = flips["value"] - excess["value"]
        said = f"asked in the other order the judge changes its mind on {_said(flips)} of pairs"
        if excess["high"] < 0:
            return None, f"no human labels, so agreement is unknown; {said} (one that does not read: {blind:.0%})"
        return False, f"{said}: that cannot be told from a judge that does not read the replies ({blind:.0%})"
    if first and _is_biased(first):
        return False, f"asked in one order only, the judge picks the first reply in {_said(first)} of asks"
    return None, "no human labels and one order only: agreement is unknown"


def _is_biased(share: Estimate) -> bool:
    return not share["low"] <= 0.5 <= share["high"]


def _said(figure: Estimate) -> str:
    return f"{figure['value']:.1%} ({figure['low']:.1%} to {figure['high']:.1%})"


def _notes(found: AuditMetrics) -> list[str]:
    notes = []
    if first := found["first_picks"]:
        notes.append(
            f"the judge picked the first reply in {_said(first)} of {first['n']:,} asks"
            + ("" if _is_biased(first) else ", which may be no liking for a position")
        )
    if content := found["content"]:
        position, noise = abs(found["position"]["value"]), found["noise"]["value"]
        shares = f"{_said(content)} of its answers go by the replies, {position:.1%} by the position"
        notes.append(f"{shares}, {noise:.1%} by chance")
    if (longer := found["longer_chosen"]) and _is_biased(longer):
        notes.append(f"the longer reply won in {_said(longer)} of pairs of unequal length")
    if found["repeated"]:
        notes.append(f"{found['repeated']:,} rows have the id of an earlier row, and are counted like the others")
    if failures := sum(found["rejected"].values()):
        notes.append(f"{failures:,} pairs have no label beside {found['ties']:,} ties, for the reasons counted")
    return notes


# --- files and the shell ------------------------------------------------------------------------------------------


def audit_file(source: str) -> AuditMetrics:
    """The audit of a file of Preference rows (`-`: stdin) and of the rejected rows beside it. Raises InvalidRow."""
    rows = (row for _, row in read_rows(source, rows_of(Preference)))
    beside = sidecar(Path(source), "rejected.jsonl")
    refused: Iterable[Rejected] = ()
    if source != "-" and beside.exists():
        refused = (row for _, row in read_rows(str(beside), rows_of(Rejected)))
    return audit(rows, refused)


def say_audit(found: AuditMetrics) -> None:
    """What a person should know of an audit, on stderr; that labels are not to be trusted is a warning."""
    if found["trusted"] is False:
        console.warn(f"do not trust these labels: {found['reason']}")
    else:
        console.say(f"labels: {found['reason']}")
    for note in found["notes"]:
        console.say(f"labels: {note}")
