"""`cai eval agreement`: audit a file of labels (paper section 2)."""

from collections.abc import Iterator
from itertools import chain

from cai_cli.common import console
from cai_cli.metrics.intervals import Estimate
from cai_cli.metrics.label_audit import AuditMetrics


def _figures(found: AuditMetrics) -> Iterator[tuple[str, Estimate]]:
    """All figures by name, those of principles and bins after the others."""
    bins = ((f"right at {b['from']:.1f} to {b['to']:.1f}", b["right"]) for b in found["reliability"])
    by_principle = (
        (f"{principle}: {name}", figure)
        for principle, figures in found["principles"].items()
        for name, figure in figures.items()
    )
    for name, figure in chain(found.items(), bins, by_principle):
        if isinstance(figure, dict) and "low" in figure:
            yield name.replace("_", " "), figure  # type: ignore[misc]


def print_audit(found: AuditMetrics) -> None:
    """Print the audit as tables."""
    verdict = {True: "yes", False: "no", None: "not known"}[found["trusted"]]
    print(f"trusted: {verdict}: {found['reason']}")
    for note in found["notes"]:
        print(f"  {note}")
    counted = f"{found['pairs']:,} pairs, {found['votes']:,} votes, {found['ties']:,} ties"
    print(f"{counted}, {found['human_only']:,} judged by humans only")
    for why, n in found["rejected"].items():
        print(f"  {n:,} rejected: {console.safe(why)}")
    print(f"{'':<46}{'value':>8}{'95% interval':>20}{'n':>12}")
    for name, f in _figures(found):
        ends = f"{f['low']:.3f} to {f['high']:.3f}"
        print(f"{console.safe(name):<46}{f['value']:>8.3f}{ends:>20}{f['n']:>12,}")
