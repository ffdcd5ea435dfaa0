"""`cai eval agreement`: audit a file of labels (paper section 2)."""

from collections.abc import Iterator
from itertools import chain

from cai_cli.common import console
from cai_cli.metrics.intervals import Estimate
from cai_cli.metrics.label_audit import AuditMetrics

# With log-odds these describe single answers, and not the labels, which average both orders.
OF_SINGLE_ANSWERS = frozenset({"flip_excess", "position", "content", "noise"})


def estimates(audit: AuditMetrics) -> Iterator[tuple[str, Estimate]]:
    """Yield (name, estimate) for every metric with an interval; those of bins and principles come last."""
    bins = ((f"right at {b['from']:.1f} to {b['to']:.1f}", b["right"]) for b in audit["reliability"])
    by_principle = (
        (f"{principle}: {name}", metric)
        for principle, metrics in audit["principles"].items()
        for name, metric in metrics.items()
    )
    for name, metric in chain(audit.items(), bins, by_principle):
        if audit["between_orders"] and name in OF_SINGLE_ANSWERS:
            continue
        if isinstance(metric, dict) and "low" in metric:
            yield name.replace("_", " "), metric  # type: ignore[misc]


def print_audit(audit: AuditMetrics) -> None:
    """Print the audit on stdout: the verdict, the notes, the counts, and a table of the metrics."""
    verdict = {True: "yes", False: "no", None: "unknown"}[audit["trusted"]]
    print(f"trusted: {verdict}: {audit['reason']}")
    for note in audit["notes"]:
        print(f"  {note}")
    counts = f"{audit['pairs']:,} pairs, {audit['votes']:,} votes, {audit['ties']:,} ties"
    print(f"{counts}, {audit['human_only']:,} judged by humans only")
    for why, n in audit["rejected"].items():
        print(f"  {n:,} rejected: {console.safe(why)}")
    print(f"{'':<46}{'value':>8}{'95% interval':>20}{'n':>12}")
    for name, e in estimates(audit):
        ends = f"{e['low']:.3f} to {e['high']:.3f}"
        print(f"{console.safe(name):<46}{e['value']:>8.3f}{ends:>20}{e['n']:>12,}")
    for what, of in (("bins", audit["reliability"]), ("principles", audit["principles"])):
        if len(of) > 1:
            print(f"the intervals of a metric over {what} are simultaneous over all {len(of):,}")
    if audit["calibration_error"]:
        error, expected = audit["calibration_error"]["value"], audit["calibration_error_if_calibrated"]
        print(f"calibration error {error:.3f}; for a calibrated judge of the same pairs {expected:.3f} on average")
