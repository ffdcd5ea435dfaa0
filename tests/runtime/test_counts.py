"""Counts: in = out + rejected + skipped."""

from cai_cli.data.schema import Rejected
from cai_cli.runtime.counts import Counts


def rejected(reason: str) -> Rejected:
    return Rejected(key="k", reason=reason, row="{}")


def test_reasons_are_counted_without_the_details_of_a_row() -> None:
    counts = Counts(items=5, out=2)
    for reason in ("empty", "bad line: in.jsonl:2: not JSON", "bad line: in.jsonl:9: not JSON"):
        counts.reject(rejected(reason))
    found = counts.as_json()
    assert (found["in"], found["out"], found["rejected"], found["skipped"]) == (5, 2, 3, 0)
    assert found["rejected_reasons"] == {"bad line": 2, "empty": 1}
    assert len(counts.rejected_rows) == 3


def test_a_training_stage_counts_the_rows_it_used() -> None:
    counts = Counts.of_training([rejected("too long")])
    counts.train, counts.held_out = 6, 2
    counts.skipped["tie"] += 3
    found = counts.as_json()
    assert (found["in"], found["used"], found["train"], found["held_out"]) == (12, 8, 6, 2)
    assert (found["rejected"], found["skipped"], "out" in found) == (1, 3, False)
