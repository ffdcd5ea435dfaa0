"""`cai revise`: revise critiqued replies under the principle of their critique (paper section 3.1).

`revise_directly` revises without a critique (section 3.5; `cai critique-revise --no-critique`). Departure: the paper
keeps every revision. Here a revision that is empty, wrapped in an introduction, repetitive, or a critique instead, is
sampled again and finally rejected with the reason (`format_checks`).
"""

from collections.abc import Sequence
from typing import Any

from cai_cli.common.errors import CaiError
from cai_cli.constitution.schema import CritiquePrinciple
from cai_cli.data.jsonl import rows_of
from cai_cli.data.schema import Critique, Rejected, Revision, RevisionRound, Sample, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.phase1_supervised.format_checks import revision_problem
from cai_cli.phase1_supervised.reviser import (
    Reviser,
    ReviserConfig,
    conversation,
    estimate_requests,
    history_of,
    run_revision_stage,
)
from cai_cli.prompting.base import assistant
from cai_cli.prompting.revision import revision_request
from cai_cli.runtime.cost import RowFlow, StepCost
from cai_cli.runtime.stage import Phase, Stage


class ReviseConfig(ReviserConfig):
    """Revise critiqued replies.

    INPUT: Critique rows, from `cai critique`. Writes Revision rows.
    """


def revise(rows: Sequence[Critique], reviser: Reviser) -> list[Revision | Rejected]:
    """Revise each critiqued reply under the principle of its critique (paper section 3.1).

    Args:
        rows: Critiqued replies.
        reviser: The model that writes revisions, and its principles.

    Returns:
        One Revision for each row, in order. A row is rejected where no answer passed `revision_problem`, or where the
        engine could not answer.

    Raises:
        CaiError: The principle of a critique is not among the reviser's principles (`unknown-principle`).
    """
    known = {p.id: p for p in reviser.principles}
    for row in rows:
        if row.principle_id not in known:
            raise CaiError(
                f"row {row.key!r} was critiqued under {row.principle_id!r}, which is not among the principles in use",
                hint="use the --constitution and --principles of `cai critique`",
                code="unknown-principle",
            )
    drawn = [known[row.principle_id] for row in rows]
    return _revised(rows, drawn, [row.critique for row in rows], reviser)


def revise_directly(rows: Sequence[Sample], reviser: Reviser) -> list[Revision | Rejected]:
    """Revise each reply without a critique, under the principle a critique would draw (paper section 3.5).

    Args:
        rows: Samples or revisions.
        reviser: The model that writes revisions, and its principles.

    Returns:
        One Revision for each row, in order, or the row rejected as in `revise`.
    """
    drawn = [reviser.principle_for(row, len(history_of(row)) + 1) for row in rows]
    return _revised(rows, drawn, [None] * len(rows), reviser)


def _revised(
    rows: Sequence[Sample], drawn: Sequence[CritiquePrinciple], critiques: Sequence[str | None], reviser: Reviser
) -> list[Revision | Rejected]:
    rounds = [len(history_of(row)) + 1 for row in rows]
    requests = [
        revision_request(
            conversation(row),
            None if text is None else (principle.critique, text),
            principle.revision,
            reviser.examples,
            reviser.form,
        )
        for row, principle, text in zip(rows, drawn, critiques, strict=True)
    ]
    answers = reviser.answers(
        "revise",
        rows,
        rounds,
        requests,
        lambda i, text: revision_problem(text, drawn[i].revision, rows[i].prompt[-1].content),
    )
    outcomes: list[Revision | Rejected] = []
    for row, n, principle, text, answer in zip(rows, rounds, drawn, critiques, answers, strict=True):
        if isinstance(answer, RequestFailure):
            outcomes.append(reject(row.key, answer.reason, row))
            continue
        this_round = RevisionRound(
            round=n,
            principle_id=principle.id,
            critique=text,
            response=row.reply,
            finish_reason=row.finish_reason,
            thoughts=row.thoughts,
        )
        fields = row.sample_fields()
        fields |= {"completion": [assistant(answer.text.strip())], "finish_reason": answer.finish_reason}
        fields["thoughts"] = answer.thoughts
        outcomes.append(Revision(**fields, history=[*history_of(row), this_round]))
    return outcomes


def estimate(rows: RowFlow, config: ReviseConfig) -> StepCost:
    """The cost of one revision per row."""
    return estimate_requests(rows, config, 1)


def run(config: ReviseConfig) -> dict[str, Any]:
    """Revise the critiqued replies of a file. Returns the summary. Raises CaiError."""
    return run_revision_stage("revise", rows_of(Critique), revise, config)


STAGE = Stage("revise", Phase.SUPERVISED, ReviseConfig, run, estimate, reads=(Critique,), writes=Revision)
