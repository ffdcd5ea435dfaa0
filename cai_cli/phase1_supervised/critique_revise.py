"""`cai critique-revise`: rounds of critique and revision in one command (paper section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from cai_cli.cli import options
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.schema import Rejected, Revision, Sample, reject
from cai_cli.phase1_supervised.critique import critique
from cai_cli.phase1_supervised.revise import revise, revise_directly
from cai_cli.phase1_supervised.reviser import Reviser, run_revision_stage


def critique_revise(
    rows: Sequence[Sample], reviser: Reviser, *, rounds: int, with_critique: bool
) -> list[Revision | Rejected]:
    """`rounds` rounds of critique and revision of each row, in order (0: the row as it came). A row that fails in any
    round is rejected as it came, so that the same command can ask again."""
    standing: list[Any] = list(rows)
    steps: list[Callable[[Sequence[Any], Reviser], Sequence[Sample | Rejected]]]
    steps = [critique, revise] if with_critique else [revise_directly]
    for step in steps * rounds:
        alive = [i for i, row in enumerate(standing) if not isinstance(row, Rejected)]
        for i, outcome in zip(alive, step([standing[i] for i in alive], reviser), strict=True):
            standing[i] = reject(outcome.key, outcome.reason, rows[i]) if isinstance(outcome, Rejected) else outcome
    return standing


def critique_revise_command(
    input: options.Input,
    output: options.Output = "-",
    model: options.Model = options.DEFAULT_MODEL,
    constitution: options.Constitution = None,
    few_shot: options.FewShot = None,
    principles: options.Principles = None,
    max_principles: options.MaxPrinciples = None,
    rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of critique and revision, each under a new draw; 0 revises nothing.")
    ] = 4,
    critique: Annotated[
        bool, typer.Option("--critique/--no-critique", help="Without: revise directly (paper section 3.5).")
    ] = True,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    prompt_format: options.PromptFormatOption = "auto",
    seed: options.Seed = 0,
    limit: options.Limit = None,
    shard: options.Shard = None,
    skip_invalid: options.SkipInvalid = False,
    max_invalid: options.MaxInvalid = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    base_url: options.BaseUrl = None,
    concurrency: options.Concurrency = None,
    timeout: options.Timeout = None,
    budget_tokens: options.BudgetTokens = None,
    price_in: options.PriceIn = None,
    price_out: options.PriceOut = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Criticise and revise replies, round after round.

    INPUT: Sample rows (or Revision rows, to go on from). Writes Revision rows with the history of all rounds; with
    --rounds 0 the rows as they came, to be compared with revised ones.
    """
    run_revision_stage(
        "critique-revise",
        sample_or_revision,
        lambda rows, reviser: critique_revise(rows, reviser, rounds=rounds, with_critique=critique),
        locals(),
    )
