"""Votes of an earlier labelling in place of asking again: `cai label-prefs --votes FILE`.

The same pairs under other limits (`--clamp`, `--min-confidence`), or under more principles, need no judge for what it
has said already. The rows are those that asking anew would give.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Preference, Rejected, Vote, load_row, with_votes
from cai_cli.judging.judge import Judgement, PairComparison
from cai_cli.runtime.manifest import differences, read_manifest
from cai_cli.runtime.output_files import sidecar

# What may differ: it decides which pairs and votes are wanted and what becomes of them, not how the judge is asked.
OTHERWISE = frozenset(
    {"clamp", "min_confidence", "principles", "max_principles", "principles_per_pair", "pairs", "both_orders", "limit",
     "shard"}
)  # fmt: skip


class RecordedVotes:
    """The votes of `source`, an output of `label-prefs`, and of what it rejected; all of them are in memory."""

    def __init__(self, source: str, provenance: Mapping[str, Any]) -> None:
        """`provenance` is that of the labelling in which they are wanted. Raises UsageError where the judge was another
        or was asked otherwise, or where the votes were clamped to less than is wanted; CaiError as `read_rows`."""
        recorded = (read_manifest(sidecar(Path(source), "manifest.json")) or {}).get("provenance", {})
        settings = recorded.get("settings", {})
        if recorded.get("stage") != "label-prefs" or not {"clamp", "cot_samples"} <= settings.keys():
            raise UsageError(f"--votes {source}: no finished output of `cai label-prefs`")
        if other := differences(_asked(recorded), _asked(provenance)):
            raise UsageError(f"--votes {source}: its judge was asked otherwise: {'; '.join(other)}")
        low, high = settings["clamp"]
        if low > provenance["settings"]["clamp"][0] or high < provenance["settings"]["clamp"][1]:
            raise UsageError(f"--votes {source}: its votes were clamped to {low},{high}, narrower than --clamp")
        self._samples = settings["cot_samples"]
        self._rows = {row.id: row for row in _labelled(source)}

    def judgement(self, comparison: PairComparison) -> Judgement | None:
        """What the judge said then; None where it was not asked this, or did not answer."""
        pair, row = comparison.pair, self._rows.get(comparison.pair.id)
        if row is None or [row.chosen, row.rejected] not in ([pair.a, pair.b], [pair.b, pair.a]):
            return None
        same_side = row.chosen == pair.a
        wanted = (comparison.principle.id, comparison.order)
        votes = [vote for vote in row.votes if (vote.principle_id, _order(vote, same_side)) == wanted]
        if len(votes) < self._samples:  # which of them were not answered is not known
            return None
        vote = votes[comparison.sample]
        return Judgement(vote.p_first, vote.rationale)


def _asked(provenance: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in provenance["settings"].items() if name not in OTHERWISE}
    return {name: provenance.get(name) for name in ("cai", "model", "constitution")} | {"settings": settings}


def _labelled(source: str) -> Iterator[Preference]:
    yield from (row for _, row in read_rows(source, rows_of(Preference)))
    beside = sidecar(Path(source), "rejected.jsonl")
    if beside.exists():
        rejected = read_rows(str(beside), lambda value: with_votes(load_row(Rejected, value)))
        yield from (row for _, row in rejected if row)


def _order(vote: Vote, same_side: bool) -> str:
    """The order of a vote on a row in terms of the pair's `a` and `b`."""
    return vote.order if same_side else {"ab": "ba", "ba": "ab"}[vote.order]
