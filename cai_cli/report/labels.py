"""The audit of AI labels (paper section 4.1): does the order decide, and does a probability mean what it says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_cli.evaluate.agreement import flips
from cai_cli.records import Preference
from cai_cli.report.charts import Bin, Chart, histogram, reliability
from cai_cli.statistics import wilson

BINS = 10


@dataclass
class Audit:
    """Counted in one pass. `first`: order -> histogram of p_first over [0, 1]; `human`: (p_chosen, humans agree)."""

    pairs: int = 0
    votes: int = 0
    first_won: int = 0
    both_orders: int = 0
    flipped: int = 0
    first: dict[str, list[int]] = field(default_factory=dict)
    p_chosen: list[int] = field(default_factory=lambda: [0] * BINS)
    human: list[tuple[float, bool]] = field(default_factory=list)

    def add(self, row: Preference) -> None:
        self.pairs += 1
        if row.votes:
            self.p_chosen[_bin((row.p_chosen - 0.5) * 2)] += 1
            if row.human:
                self.human.append((row.p_chosen, row.human == "chosen"))
        for vote in row.votes:
            self.votes += 1
            self.first_won += vote.p_first > 0.5
            self.first.setdefault(vote.order, [0] * BINS)[_bin(vote.p_first)] += 1
        flipped = flips(row.votes)
        self.both_orders += len(flipped)
        self.flipped += sum(flipped)

    def figures(self) -> dict[str, Any]:
        """Shares as {"value", "low", "high", "n"} (95% Wilson; None where nothing can be said), and the reliability
        curve: bins of confidence with the share of labels that humans agree with."""
        return {
            "flip_rate": wilson(self.flipped, self.both_orders),
            "first_picks": wilson(self.first_won, self.votes),
            "agreement": wilson(sum(right for _, right in self.human), len(self.human)),
            "reliability": reliability_bins(self.human),
        }

    def charts(self) -> list[Chart]:
        if not self.votes:
            return []
        names = {"ab": "chosen reply first", "ba": "rejected reply first"}
        edges = [i / BINS for i in range(BINS + 1)]
        found = [
            histogram(
                "labels-first",
                "Probability given to the first reply",
                {names[order]: counts for order, counts in sorted(self.first.items())},
                edges,
                x_label="probability",
                note="A judge that reads puts one order right and the other left; one that likes a position, both on "
                "one side.",
            ),
            histogram(
                "labels-p-chosen",
                "How sure the labels are",
                {"comparisons": self.p_chosen},
                [0.5 + i / BINS / 2 for i in range(BINS + 1)],
                x_label="probability of the chosen reply",
            ),
        ]
        if bins := self.figures()["reliability"]:
            found.append(
                reliability(
                    "labels-reliability",
                    "Do humans agree as often as the label says?",
                    [
                        Bin(b["confidence"], b["right"]["value"], b["n"], b["right"]["low"], b["right"]["high"])
                        for b in bins
                    ],
                    x_label="probability of the chosen reply",
                    note="On the dashed line a probability means what it says.",
                )
            )
        return found


def audit(rows: Iterable[Preference]) -> Audit:
    counted = Audit()
    for row in rows:
        counted.add(row)
    return counted


def reliability_bins(labelled: Sequence[tuple[float, bool]], count: int = 5) -> list[dict[str, Any]]:
    """(p_chosen, humans agree) in `count` equal bins over [0.5, 1]; empty ones are left out."""
    bins = []
    for k in range(count):
        found = [(p, right) for p, right in labelled if min(count - 1, int((p - 0.5) * 2 * count)) == k]
        if found:
            right = wilson(sum(right for _, right in found), len(found))
            bins.append({"n": len(found), "confidence": sum(p for p, _ in found) / len(found), "right": right})
    return bins


def _bin(share: float) -> int:
    return min(BINS - 1, int(share * BINS))
