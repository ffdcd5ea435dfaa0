"""Reuses the votes of an earlier labelling (`cai label-prefs --votes FILE`).

Labelling the same pairs with other limits (`--clamp`, `--min-confidence`), or with more principles, does not repeat
judgements that FILE already contains. The rows are the same as without it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.common.legacy import changed_between
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Preference, Rejected, Vote, load_row, with_votes
from cai_cli.judging.base import Judgement, PairComparison
from cai_cli.runtime.manifest import differences, read_manifest
from cai_cli.runtime.output_files import sidecar

# These settings may differ: they decide which pairs and votes are needed and what becomes of them, not how the judge is
# prompted.
MAY_DIFFER = frozenset(
    {"clamp", "min_confidence", "principles", "max_principles", "principles_per_pair", "pairs", "both_orders", "limit",
     "shard"}
)  # fmt: skip


class RecordedVotes:
    """The votes of an earlier output of `label-prefs`, including its rejected pairs, all in memory.

    Args:
        source: Path of the earlier output.
        provenance: Provenance of the labelling that reuses the votes.

    Raises:
        UsageError: The output is not finished, or it has another judge or other prompts.
        CaiError: The file cannot be read.
    """

    _outdated: str | None = None

    def __init__(self, source: str, provenance: Mapping[str, Any]) -> None:
        recorded = (read_manifest(sidecar(Path(source), "manifest.json")) or {}).get("provenance", {})
        settings = recorded.get("settings", {})
        if recorded.get("stage") != "label-prefs" or not {"clamp", "cot_samples"} <= settings.keys():
            raise UsageError(f"--votes {source}: not a finished output of `cai label-prefs`", code="not-made-by-cai")
        if different := differences(_judge_settings(recorded), _judge_settings(provenance)):
            raise UsageError(f"--votes {source}: the judge differs: {'; '.join(different)}", code="other-run")
        # Raised when a vote is needed, not here: a finished output is recognised whatever its votes.
        if changed_between("label-prefs", recorded["cai"], provenance["cai"]):
            self._outdated = (
                f"--votes {source}: cai {recorded['cai']} prompted the judge differently and clamped each vote"
            )
        self._samples = settings["cot_samples"]
        self._rows = {row.id: row for row in _labelled(source)}

    def judgement(self, comparison: PairComparison) -> Judgement | None:
        """Return the recorded judgement of a comparison, or None where there is none.

        Raises:
            UsageError: A version that prompted the judge differently, and clamped each vote, recorded the votes.
        """
        if self._outdated:
            raise UsageError(self._outdated, hint="label the pairs again, without --votes", code="other-run")
        pair, row = comparison.pair, self._rows.get(comparison.pair.id)
        if row is None or [row.chosen, row.rejected] not in ([pair.a, pair.b], [pair.b, pair.a]):
            return None
        same_side = row.chosen == pair.a
        key = (comparison.principle.id, comparison.order)
        votes = [vote for vote in row.votes if (vote.principle_id, _order(vote, same_side)) == key]
        if len(votes) < self._samples:  # it is unknown which of the samples failed
            return None
        vote = votes[comparison.sample]
        return Judgement(vote.p_first, vote.rationale)


def _judge_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in provenance["settings"].items() if name not in MAY_DIFFER}
    return {name: provenance.get(name) for name in ("cai", "model", "constitution")} | {"settings": settings}


def _labelled(source: str) -> Iterator[Preference]:
    yield from (row for _, row in read_rows(source, rows_of(Preference)))
    rejected_file = sidecar(Path(source), "rejected.jsonl")
    if rejected_file.exists():
        rejected = read_rows(str(rejected_file), lambda value: with_votes(load_row(Rejected, value)))
        yield from (row for _, row in rejected if row)


def _order(vote: Vote, same_side: bool) -> str:
    """Return the order of a vote on a row in terms of the pair's `a` and `b`."""
    return vote.order if same_side else {"ab": "ba", "ba": "ab"}[vote.order]
