"""Votes under the principles that fit the kind of the prompt (paper section 4.3).

The paper's crowdworkers judge helpfulness and harmlessness separately. A judge that held replies to helpful prompts to
the harmlessness principles would prefer a needless refusal.
"""

from collections.abc import Sequence
from dataclasses import replace

from cai_cli.data.schema import Kind, Pair
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.votes import Labeller, PairVerdict, aggregate_votes
from cai_cli.prompting.evaluation import HELPFULNESS


def votes_by_kind(
    pairs: Sequence[Pair], kinds: Sequence[Kind | None], labeller: Labeller
) -> list[PairVerdict | RequestFailure]:
    """Return one verdict for each pair, in order: by helpfulness where the prompt is helpful, else by the principles.

    Args:
        pairs: The pairs to judge.
        kinds: The kind of each pair's prompt; None is judged as a red-team prompt is.
        labeller: The judge and its principles.
    """
    by_helpfulness = replace(labeller, principles=[HELPFULNESS], per_pair=1)
    others = iter(aggregate_votes(_of_kind(pairs, kinds, helpful=False), labeller))
    helpful = iter(aggregate_votes(_of_kind(pairs, kinds, helpful=True), by_helpfulness))
    return [next(helpful if kind == "helpful" else others) for kind in kinds]


def _of_kind(pairs: Sequence[Pair], kinds: Sequence[Kind | None], *, helpful: bool) -> list[Pair]:
    return [pair for pair, kind in zip(pairs, kinds, strict=True) if (kind == "helpful") == helpful]
