"""Charts of the audit of AI labels (paper section 4.1): position bias, confidence and calibration.

The numbers are those of `cai eval agreement`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_cli.data.schema import Preference, Rejected
from cai_cli.metrics.label_audit import LabelAudit
from cai_cli.report.charts import Bin, Chart, adjustment, histogram, reliability

BINS = 10


@dataclass
class LabelCharts:
    """Collects labels in one pass, for their audit and for histograms.

    Attributes:
        label_audit: The audit.
        p_first: Order of the replies -> histogram of p_first over [0, 1].
        p_chosen: Histogram of p_chosen over [0.5, 1].
    """

    label_audit: LabelAudit = field(default_factory=LabelAudit)
    p_first: dict[str, list[int]] = field(default_factory=dict)
    p_chosen: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, row: Preference | Rejected) -> None:
        """Add a label, or a rejected pair."""
        self.label_audit.add(row)
        if isinstance(row, Rejected) or not row.votes:
            return
        self.p_chosen[_bin((row.p_chosen - 0.5) * 2)] += 1
        for vote in row.votes:
            self.p_first.setdefault(vote.order, [0] * BINS)[_bin(vote.p_first)] += 1

    def charts(self, metrics: Mapping[str, Any], *, id: str = "labels", step: str = "") -> list[Chart]:
        """Return the charts; none where no row has votes.

        Args:
            metrics: The audit of the same rows.
            id: Start of the id of each chart.
            step: Name of the step, added to the titles where a page shows several.
        """
        if not self.p_first:
            return []
        suffix = f" ({step})" if step else ""
        charts = [self._p_first_chart(id, suffix), self._p_chosen_chart(id, suffix)]
        if bins := metrics["reliability"]:
            charts.append(_reliability_chart(bins, id, suffix))
        return charts

    def _p_first_chart(self, id: str, suffix: str) -> Chart:
        names = {"ab": "chosen reply first", "ba": "rejected reply first"}
        return histogram(
            f"{id}-first",
            f"Probability of the reply in first position{suffix}",
            {names[order]: counts for order, counts in sorted(self.p_first.items())},
            [i / BINS for i in range(BINS + 1)],
            x_label="probability",
            note="A judge that reads the replies sets the two orders apart; a position bias moves both of them to the "
            "same side.",
        )

    def _p_chosen_chart(self, id: str, suffix: str) -> Chart:
        return histogram(
            f"{id}-p-chosen",
            f"Confidence of the labels{suffix}",
            {"comparisons": self.p_chosen},
            [0.5 + i / BINS / 2 for i in range(BINS + 1)],
            x_label="probability of the chosen reply",
        )


def _reliability_chart(bins: Sequence[Mapping[str, Any]], id: str, suffix: str) -> Chart:
    return reliability(
        f"{id}-reliability",
        f"Calibration against human labels{suffix}",
        [Bin(b["confidence"], b["right"]["value"], b["n"], b["right"]["low"], b["right"]["high"]) for b in bins],
        x_label="probability of the chosen reply",
        note="On the dashed line humans agree as often as the label predicts. "
        f"The bars are 95% intervals{adjustment(len(bins))}.",
    )


def _bin(share: float) -> int:
    return min(BINS - 1, int(share * BINS))
