"""`cai critique`: critique replies under drawn principles (paper section 3.1).

Every row and round draws its own principle. The input may be samples or revisions: a revision is critiqued as its next
round and keeps its history, so rounds can be chained as `critique | revise | critique | revise`.
"""

from collections.abc import Sequence
from typing import Any

from cai_cli.data.formats import sample_or_revision
from cai_cli.data.schema import Critique, Rejected, Revision, Sample, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.phase1_supervised.format_checks import critique_problem
from cai_cli.phase1_supervised.reviser import (
    Reviser,
    ReviserConfig,
    conversation,
    estimate_requests,
    history_of,
    run_revision_stage,
)
from cai_cli.prompting.revision import critique_request
from cai_cli.runtime.cost import RowFlow, StepCost
from cai_cli.runtime.stage import Phase, Stage


class CritiqueConfig(ReviserConfig):
    """Critique replies under drawn principles.

    INPUT: Sample or Revision rows. Writes Critique rows, for `cai revise`.
    """


def critique(rows: Sequence[Sample], reviser: Reviser) -> list[Critique | Rejected]:
    """Critique the reply of each row under a drawn principle (paper section 3.1).

    Args:
        rows: Samples or revisions, from a batch of any size.
        reviser: The model that writes critiques, and its principles.

    Returns:
        One Critique for each row, in order. A row is rejected if no answer passed `critique_problem` or the engine
        could not answer.
    """
    rounds = [len(history_of(row)) + 1 for row in rows]
    drawn = [reviser.principle_for(row, n) for row, n in zip(rows, rounds, strict=True)]
    requests = [
        critique_request(conversation(row), principle.critique, reviser.examples, reviser.form)
        for row, principle in zip(rows, drawn, strict=True)
    ]
    answers = reviser.answers("critique", rows, rounds, requests, lambda _, text: critique_problem(text))
    outcomes: list[Critique | Rejected] = []
    for row, n, principle, answer in zip(rows, rounds, drawn, answers, strict=True):
        if isinstance(answer, RequestFailure):
            outcomes.append(reject(row.key, answer.reason, row))
            continue
        outcomes.append(
            Critique(
                **row.sample_fields(),
                history=history_of(row),
                round=n,
                principle_id=principle.id,
                critique=answer.text.strip(),
            )
        )
    return outcomes


def estimate(rows: RowFlow, config: CritiqueConfig) -> StepCost:
    """The cost of one critique per row."""
    return estimate_requests(rows, config, 1)


def run(config: CritiqueConfig) -> dict[str, Any]:
    """Critique the replies of a file. Returns the summary. Raises CaiError."""
    return run_revision_stage("critique", sample_or_revision, critique, config)


STAGE = Stage("critique", Phase.SUPERVISED, CritiqueConfig, run, estimate, reads=(Sample, Revision), writes=Critique)
