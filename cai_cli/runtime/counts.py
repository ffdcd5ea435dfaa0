"""How many rows were read, and what happened to them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cai_cli.data.dropped import Dropped
from cai_cli.data.reply_ends import ReplyEnds
from cai_cli.data.schema import Rejected, reason_kind


@dataclass
class Counts:
    """The conservation of rows: in = out + rejected + skipped; and what was left out of them (`dropped`).

    A data stage sets `items` and `out` and counts its rejected rows by reason when the output is complete. A training
    stage (`for_training`) sets `train` and `held_out` instead, which together are the rows it used, and keeps the
    rejected rows until it can write them, and counts the rows it used by the input that they come from (`by_input`).
    `reply_ends` counts how the replies of the output ended, or of the training data.
    """

    items: int = 0
    out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Dropped = field(default_factory=Dropped)
    read_as: Counter[str] = field(default_factory=Counter)
    for_training: bool = False
    train: int = 0
    held_out: int = 0
    by_input: Counter[str] = field(default_factory=Counter)
    rejected_rows: list[Rejected] = field(default_factory=list)
    reply_ends: ReplyEnds = field(default_factory=ReplyEnds)

    @classmethod
    def of_training(cls, rejected: list[Rejected], dropped: Dropped | None = None) -> "Counts":
        """The counts of a training stage whose input reader has rejected these rows so far, and left these columns
        out."""
        counts = cls(for_training=True, dropped=dropped or Dropped())
        for row in rejected:
            counts.reject(row)
        return counts

    def reject(self, row: Rejected) -> None:
        """Count a rejected row under its reason, and keep it."""
        self.rejected[reason_kind(row.reason)] += 1
        self.rejected_rows.append(row)

    def as_json(self) -> dict[str, Any]:
        """The counts as manifests and summaries store them."""
        out = {"out": self.out}
        read = self.items
        if self.for_training:
            used = self.train + self.held_out
            out = {"used": used, "train": self.train, "held_out": self.held_out}
            read = used + self.rejected.total() + self.skipped.total()
        return {
            "in": read,
            **out,
            "rejected": self.rejected.total(),
            "skipped": self.skipped.total(),
            "rejected_reasons": dict(sorted(self.rejected.items())),
            "skipped_reasons": dict(sorted(self.skipped.items())),
            **({"used_by_input": dict(self.by_input)} if len(self.by_input) > 1 else {}),
            **({"read_as": dict(self.read_as.most_common())} if self.read_as else {}),
            **({"dropped": self.dropped.as_json()} if self.dropped.counts else {}),
        }

    def ends_as_json(self) -> dict[str, Any]:
        """How replies ended, under the key `reply_ends` of manifests and summaries; empty where no row has a reply."""
        ends = self.reply_ends.as_json()
        return {"reply_ends": ends} if ends else {}
