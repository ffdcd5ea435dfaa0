"""Counts what reading leaves out of rows, so that nothing is left out silently."""

from collections import Counter

MOST_NAMES = 50
LONGEST_NAME = 60


class Dropped:
    """The columns and parts of messages that were left out, each with its number of rows or messages.

    Names come from the input, so their number and length are bounded.

    >>> dropped = Dropped()
    >>> dropped.add("score"), dropped.add("score"), dropped.as_json()
    (None, None, {'score': 2})
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count one occurrence of `name`."""
        name = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…"
        known = name in self.counts or len(self.counts) < MOST_NAMES
        self.counts[name if known else "other columns"] += 1

    def as_json(self) -> dict[str, int]:
        """The counts by name, the most frequent first."""
        return dict(self.counts.most_common())

    def __add__(self, other: "Dropped") -> "Dropped":
        both = Dropped()
        both.counts = self.counts + other.counts
        return both
