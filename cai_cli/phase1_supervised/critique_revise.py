"""`cai critique-revise`: rounds of critique and revision in one command (paper section 3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cai_cli.data.formats import sample_or_revision
from cai_cli.data.schema import Rejected, Revision, Sample, reject
from cai_cli.phase1_supervised.critique import critique
from cai_cli.phase1_supervised.revise import revise, revise_directly
from cai_cli.phase1_supervised.reviser import Reviser, ReviserConfig, estimate_requests, run_revision_stage
from cai_cli.runtime.config import Option, option
from cai_cli.runtime.cost import RowFlow, StepCost
from cai_cli.runtime.stage import Phase, Stage


class CritiqueReviseConfig(ReviserConfig):
    """Critique and revise replies, round after round.

    INPUT: Sample rows, or Revision rows to continue. Writes Revision rows with the history of all rounds. With
    --rounds 0 it writes the rows unchanged, as a baseline to compare revisions with.
    """

    rounds: int = option(4, "Rounds of critique and revision; each draws its own principle.", ge=0)
    critique: bool = option(
        True,
        "Critique each reply before revising it, or revise it directly (paper section 3.5).",
        Option(flags=("--critique/--no-critique",)),
    )


def critique_revise(
    rows: Sequence[Sample], reviser: Reviser, *, rounds: int, with_critique: bool
) -> list[Revision | Rejected]:
    """Critique and revise each row, round after round (paper sections 3.1 and 3.5).

    Args:
        rows: Samples, or revisions to continue.
        reviser: The model that writes critiques and revisions, and its principles.
        rounds: Number of rounds, each under a newly drawn principle. With 0 the rows are returned unchanged.
        with_critique: Whether a round critiques before it revises.

    Returns:
        One row for each input row, in order. A row that fails in any round is rejected in its original form, so that
        the rejected rows can be the input of the same command.
    """
    current: list[Any] = list(rows)
    steps: list[Callable[[Sequence[Any], Reviser], Sequence[Sample | Rejected]]]
    steps = [critique, revise] if with_critique else [revise_directly]
    for step in steps * rounds:
        alive = [i for i, row in enumerate(current) if not isinstance(row, Rejected)]
        for i, outcome in zip(alive, step([current[i] for i in alive], reviser), strict=True):
            current[i] = reject(outcome.key, outcome.reason, rows[i]) if isinstance(outcome, Rejected) else outcome
    return current


def estimate(rows: RowFlow, config: CritiqueReviseConfig) -> StepCost:
    """The cost of all rounds."""
    if not config.rounds:
        return replace(estimate_requests(rows, config, 0), output=rows)
    rounds = rows.rounds + config.rounds
    return estimate_requests(rows, config, config.rounds * (2 if config.critique else 1), rounds)


def run(config: CritiqueReviseConfig) -> dict[str, Any]:
    """Critique and revise the replies of a file. Returns the summary. Raises CaiError."""
    return run_revision_stage(
        "critique-revise",
        sample_or_revision,
        lambda rows, reviser: critique_revise(rows, reviser, rounds=config.rounds, with_critique=config.critique),
        config,
    )


STAGE = Stage(
    "critique-revise",
    Phase.SUPERVISED,
    CritiqueReviseConfig,
    run,
    estimate,
    reads=(Sample, Revision),
    writes=Revision,
)
