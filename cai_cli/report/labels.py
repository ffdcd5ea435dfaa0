"""The audit of AI labels (paper section 4.1): does the order decide, and does a probability mean what it says.

Every figure is that of `cai eval agreement`; here it is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cai_cli.data.schema import Preference, Rejected
from cai_cli.metrics.label_audit import LabelAudit
from cai_cli.report.charts import Bin, Chart, histogram, reliability

BINS = 10


@dataclass
class Audit:
    """Counted in one pass. `first`: order -> histogram of p_first over [0, 1]."""

    label_audit: LabelAudit = field(default_factory=LabelAudit)
    first: dict[str, list[int]] = field(default_factory=dict)
    p_chosen: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, row: Preference | Rejected) -> None:
        self.label_audit.add(row)
        if isinstance(row, Rejected) or not row.votes:
            return
        self.p_chosen[_bin((row.p_chosen - 0.5) * 2)] += 1
        for vote in row.votes:
            self.first.setdefault(vote.order, [0] * BINS)[_bin(vote.p_first)] += 1

    def charts(self, figures: Mapping[str, Any], *, id: str = "labels", of: str = "") -> list[Chart]:
        """`id` begins the id of each; `of` names the step in their titles, where a page shows several."""
        if not self.first:
            return []
        of = f" ({of})" if of else ""
        names = {"ab": "chosen reply first", "ba": "rejected reply first"}
        edges = [i / BINS for i in range(BINS + 1)]
        found = [
            histogram(
                f"{id}-first",
                f"Probability given to the first reply{of}",
                {names[order]: counts for order, counts in sorted(self.first.items())},
                edges,
                x_label="probability",
                note="A judge that reads puts one order right and the other left; one that likes a position, both on "
                "one side.",
            ),
            histogram(
                f"{id}-p-chosen",
                f"How sure the labels are{of}",
                {"comparisons": self.p_chosen},
                [0.5 + i / BINS / 2 for i in range(BINS + 1)],
                x_label="probability of the chosen reply",
            ),
        ]
        if bins := figures["reliability"]:
            found.append(
                reliability(
                    f"{id}-reliability",
                    f"Do humans agree as often as the label says?{of}",
                    [
                        Bin(b["confidence"], b["right"]["value"], b["n"], b["right"]["low"], b["right"]["high"])
                        for b in bins
                    ],
                    x_label="probability of the chosen reply",
                    note="On the dashed line a probability means what it says.",
                )
            )
        return found


def _bin(share: float) -> int:
    return min(BINS - 1, int(share * BINS))
