"""Counts how the replies of a file ended: whole, or cut off at the length limit."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

CUT_OFF = "length"  # the finish reason of a reply that was cut off


class ReplyEnds:
    """Counts of replies and of revisions by how they ended.

    A reply whose row does not say how it ended, as in data from elsewhere, is counted as unknown.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, what: str, finish_reason: str | None) -> None:
        """Count one text of the kind `what`, such as "revisions"."""
        end = "unknown" if finish_reason is None else "cut_off" if finish_reason == CUT_OFF else "whole"
        self._counts.setdefault(what, Counter())[end] += 1

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Count the texts of a row, given as the JSON object that a stage writes. Other rows have none."""
        if "chosen_finish_reason" in row:
            self.add("replies", row["chosen_finish_reason"])
            self.add("replies", row["rejected_finish_reason"])
        elif "finish_reason" in row:
            reasons = [*(each.get("finish_reason") for each in row.get("history") or ()), row["finish_reason"]]
            self.add("replies" if row.get("critique") is None else "criticised replies", reasons[0])
            for reason in reasons[1:]:
                self.add("revisions", reason)

    def as_json(self) -> dict[str, dict[str, int]]:
        """The counts as manifests and summaries store them; empty without any reply."""
        return {what: {end: count[end] for end in ("whole", "cut_off", "unknown")}
                for what, count in self._counts.items()}  # fmt: skip


def cut_off_share(counts: Mapping[str, Mapping[str, int]]) -> str:
    """What a summary line says of `ReplyEnds.as_json`; an empty string where nothing is known to be cut off.

    >>> cut_off_share({"replies": {"whole": 9, "cut_off": 1, "unknown": 2}})
    '1 of 10 replies (2 more unknown) cut off at the length limit'
    """
    parts = [
        f"{count['cut_off']:,} of {count['cut_off'] + count['whole']:,} {what}"
        + (f" ({count['unknown']:,} more unknown)" if count["unknown"] else "")
        for what, count in counts.items()
        if count["cut_off"]
    ]
    return f"{' and '.join(parts)} cut off at the length limit" if parts else ""
