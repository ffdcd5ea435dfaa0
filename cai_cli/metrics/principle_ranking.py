"""Which principles earn their place: each principle's votes against a reference (`cai principles rank`).

The votes of one principle on a pair are averaged over the orders, as in a label. For each principle:

- agreement with humans: the share of pairs on which it prefers the reply that humans prefer;
- agreement with the panel: the same for the pooled label of other judges (the files of `--panel`), or, without such
  files, of the other principles of the same judge. Those share the judge's habits, so that this agreement shows only
  that a principle votes as the others do; votes in one order only are left out, because their position bias agrees;
- flips: the share of pairs whose winner changes with the order (a principle answered at random: one half);
- information added: the log loss and the accuracy of the label pooled over the pair's principles, with the principle
  and without it. The reference is the human label, and the panel of other judges where no row has a human label. A pair
  judged under one principle alone has no label without it and is left out.

Ties count as half right; a reference without a winner is left out. Every interval is computed over prompts, and those
of one metric are simultaneous over the principles: with a confidence of 95% none of them excludes its value. A
principle is said to agree or to disagree with the reference only where its interval excludes one half.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_cli.common.errors import CaiError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.formats import parse_preference
from cai_cli.data.jsonl import display_name, origin, read_rows
from cai_cli.data.schema import Preference, Rejected, Vote, conversation_id, load_row, with_votes
from cai_cli.metrics.intervals import ClusterBootstrap, fewest_clusters
from cai_cli.metrics.label_audit import WINNER_SUMS, mean_for_chosen, votes_by_principle, win_or_half, winner_sums
from cai_cli.runtime.output_files import sidecar

if TYPE_CHECKING:
    from cai_cli.metrics.intervals import Numbers

Reference = Literal["human", "panel"]
REFERENCES: tuple[Reference, ...] = ("human", "panel")
# In a log loss no label counts as more certain than this: one vote of certainty would outweigh all others.
CERTAIN = 0.99
LARGEST_LOSS = math.log(CERTAIN / (1 - CERTAIN))
PRINCIPLE_SUMS = (
    *WINNER_SUMS,
    "pairs",
    *(f"{name} {of}" for of in REFERENCES for name in ("n", "right", "pooled", "log loss", "accuracy")),
)


@dataclass(frozen=True)
class References:
    """Labels of other files for the pairs of a file of votes, by the pair's content.

    Attributes:
        human: Probability, 0 or 1, that humans prefer the reply whose text comes first in the order of strings.
        panel: The same probability in the labels of each other judge.
    """

    human: dict[bytes, float] = field(default_factory=dict)
    panel: dict[bytes, list[float]] = field(default_factory=dict)

    def add_human(self, row: Preference) -> None:
        """Add a row's human label, if it has one."""
        if row.human is not None:
            self.human[_content(row)] = _in_order_of_texts(row, float(row.human == "chosen"))

    def add_panel(self, row: Preference) -> None:
        """Add the label that a judge gave to a row; a row that only humans labelled has none."""
        if row.votes or row.human is None:
            self.panel.setdefault(_content(row), []).append(_in_order_of_texts(row, row.p_chosen))

    def of(self, row: Preference) -> tuple[float | None, float | None]:
        """The probabilities that humans and the panel prefer `chosen`; None where there is no such label."""
        key = _content(row)
        judges = self.panel.get(key)
        panel = None if judges is None else _in_order_of_texts(row, math.fsum(judges) / len(judges))
        if row.human is not None:
            return float(row.human == "chosen"), panel
        return None if key not in self.human else _in_order_of_texts(row, self.human[key]), panel


def _texts(row: Preference) -> tuple[str, str]:
    return row.chosen[0].content, row.rejected[0].content


def _content(row: Preference) -> bytes:
    """A hash of the prompt and the two replies, whichever of them is preferred: ids may differ between files."""
    one, other = sorted(_texts(row))
    return blake2b("\0".join((conversation_id(row.prompt), one, other)).encode(), digest_size=16).digest()


def _in_order_of_texts(row: Preference, p_chosen: float) -> float:
    chosen, rejected = _texts(row)
    return p_chosen if chosen <= rejected else 1 - p_chosen


class PrincipleRanking:
    """Collects, row by row, the sums by prompt from which principles are ranked.

    Args:
        references: Labels of other files.

    Examples:
        >>> PrincipleRanking(References()).result()["principles"]
        []
    """

    def __init__(self, references: References) -> None:
        self.references = references
        self.judges = bool(references.panel)
        self.prompts = KeyTable()
        self.principles: dict[str, ClusterBootstrap[str]] = {}
        self.pairs = 0

    def add(self, row: Preference) -> None:
        """Add the votes on one pair. A row without votes is ignored."""
        if not row.votes:
            return
        self.pairs += 1
        prompt = self.prompts.number(conversation_id(row.prompt))
        votes = votes_by_principle(row.votes)
        labels = {principle: mean_for_chosen(cast) for principle, cast in votes.items()}
        human, panel = self.references.of(row)
        for principle, cast in votes.items():
            others = [label for name, label in labels.items() if name != principle]
            sums: dict[Any, float] = {"pairs": 1, **winner_sums(cast)}
            sums |= _against("human", labels[principle], human, others)
            if self.judges:
                sums |= _against("panel", labels[principle], panel, others)
            elif _without_position(cast):
                steady = [labels[name] for name, of in votes.items() if name != principle and _without_position(of)]
                sums |= _agreement("panel", labels[principle], _mean(steady))
            self.principles.setdefault(principle, ClusterBootstrap(PRINCIPLE_SUMS)).add(prompt, sums)

    def result(self) -> dict[str, Any]:
        """Return the ranking.

        Returns:
            `pairs`; `reference`, by which principles are ranked and the information added is measured ("human",
            "panel", or None where nothing can be compared); `panel`, what it consists of; `simultaneous`, the number of
            principles over which the intervals hold at once; and `principles`, the best first, each with its estimates
            and its `finding`: "agrees", "disagrees" (with the reference) or "not shown", with the `reason`.
        """
        totals = {of: sum(sums.total(f"n {of}") for sums in self.principles.values()) for of in REFERENCES}
        reference = next((of for of in REFERENCES if totals[of]), None)
        ranked = [_principle(name, sums, reference, len(self.principles)) for name, sums in self.principles.items()]
        panel = ("judges" if self.judges else "principles") if totals["panel"] else None
        return {
            "pairs": self.pairs,
            "prompts": self.prompts.size,
            "reference": reference,
            "panel": panel,
            "simultaneous": len(ranked),
            "principles": sorted(ranked, key=_best_first),
        }


# --- sums of one pair ---------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _without_position(votes: Sequence[Vote]) -> bool:
    """Whether a judge compared the replies, and a position bias cancels in the mean of its votes or cannot occur."""
    method = votes[0].method
    return method == "contrast" or (method != "unjudged" and {vote.order for vote in votes} == {"ab", "ba"})


def _agreement(of: Reference, label: float, reference: float | None) -> dict[str, float]:
    if reference is None or reference == 0.5:
        return {}
    return {f"n {of}": 1, f"right {of}": win_or_half(label if reference > 0.5 else 1 - label)}


def _against(of: Reference, label: float, reference: float | None, others: Sequence[float]) -> dict[str, float]:
    """The sums of a principle's label against a reference, alone and as a part of the pooled label."""
    sums = _agreement(of, label, reference)
    if not sums or reference is None or not others:
        return sums
    without, pooled = math.fsum(others) / len(others), math.fsum([*others, label]) / (len(others) + 1)
    right = [_agreement(of, p, reference)[f"right {of}"] for p in (pooled, without)]
    saved = _log_loss(without, reference) - _log_loss(pooled, reference)
    return {**sums, f"pooled {of}": 1, f"log loss {of}": saved, f"accuracy {of}": right[0] - right[1]}


def _log_loss(p: float, reference: float) -> float:
    p = min(CERTAIN, max(1 - CERTAIN, p))
    return -(reference * math.log(p) + (1 - reference) * math.log(1 - p))


# --- metrics of sums ----------------------------------------------------------------------------------------------


def _principle(name: str, sums: ClusterBootstrap[str], reference: Reference | None, among: int) -> dict[str, Any]:
    """The metrics of one of `among` principles."""
    added: Mapping[str, Any] = {"log_loss_saved": None, "accuracy_added": None}
    if reference:
        columns = {"log_loss_saved": ("log loss", LARGEST_LOSS), "accuracy_added": ("accuracy", 1.0)}
        added = {
            key: sums.estimate(
                _mean_of(f"{column} {reference}", reference), f"pooled {reference}", (-most, most), among
            )
            for key, (column, most) in columns.items()
        }
    metrics = {
        "id": name,
        "pairs": round(sums.total("pairs")),
        "agreement_human": sums.share("right human", "n human", among),
        "agreement_panel": sums.share("right panel", "n panel", among),
        "flip_rate": sums.share("flips", "both_orders", among),
        "first_picks": sums.share("firsts", "picks", among),
        **added,
    }
    finding, reason = _finding(metrics, reference, sums.clusters(f"n {reference}") if reference else 0, among)
    flips = metrics["flip_rate"]
    return {**metrics, "finding": finding, "reason": reason, "position_decides": bool(flips and flips["low"] > 0.5)}


def _mean_of(column: str, reference: Reference) -> Any:
    def mean(s: "Mapping[str, Numbers]") -> "Numbers":
        return s[column] / s[f"pooled {reference}"]

    return mean


def _finding(metrics: Mapping[str, Any], reference: Reference | None, prompts: int, among: int) -> tuple[str, str]:
    """What is shown of a principle, and why."""
    agreement = metrics[f"agreement_{reference}"] if reference else None
    if agreement is None:
        return "not shown", "no pair has a label to compare with"
    if agreement["low"] > 0.5:
        return "agrees", "the interval lies above chance"
    if agreement["high"] < 0.5:
        return "disagrees", "the interval lies below chance"
    if prompts < (needed := fewest_clusters(among)):
        return "not shown", f"too few prompts: {prompts} of the {needed} that the claim needs"
    return "not shown", "the interval contains chance"


def _best_first(principle: Mapping[str, Any]) -> tuple[float, str]:
    agreement = principle["agreement_human"] or principle["agreement_panel"]
    return (-agreement["value"] if agreement else 1.0, principle["id"])


# --- files --------------------------------------------------------------------------------------------------------


def rank_files(labels: str, human: str | None = None, panel: Iterable[str] = ()) -> dict[str, Any]:
    """Return the ranking of the principles of a file of labels; the pairs rejected with their votes count as well.

    Args:
        labels: File of Preference rows with votes, or `-` for stdin.
        human: File of pairs with human labels, for rows that have none.
        panel: Files of the labels that other judges gave to the same pairs.

    Raises:
        InvalidRow: A line is not a valid row.
        CaiError: A file cannot be read, or the labels have no votes (`no-rows`).
    """
    references = References()
    for row in _preferences(human) if human else ():
        references.add_human(row)
    for file in panel:
        for row in _preferences(file):
            references.add_panel(row)
    ranking = PrincipleRanking(references)
    for row in _with_rejected(labels):
        ranking.add(row)
    if not ranking.pairs:
        hint = "`cai label-prefs` writes votes"
        raise CaiError(f"{display_name(labels)} holds no votes", hint=hint, code="no-rows")
    return ranking.result()


def _preferences(source: str) -> Iterator[Preference]:
    yield from (row for _, row in read_rows(source, lambda value: parse_preference(value, source=origin(source))))


def _with_rejected(source: str) -> Iterator[Preference]:
    """The rows of a file of labels, and those rejected with their votes, which `--min-confidence` selects."""
    yield from _preferences(source)
    if source == "-":
        return
    rejected = sidecar(Path(source), "rejected.jsonl")
    if rejected.exists():
        rows = read_rows(str(rejected), lambda value: with_votes(load_row(Rejected, value)))
        yield from (row for _, row in rows if row)
