"""`cai critique`: replies -> replies with a critique (paper section 3.1).

A principle is drawn anew for every row and round. The input may be samples or revisions: a revision is criticised in
its next round and keeps its history, so rounds can be chained as `critique | revise | critique | revise`.
"""

from collections.abc import Sequence

from cai_cli.cli import options
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.schema import Critique, Rejected, Sample, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.phase1_supervised.format_checks import critique_problem
from cai_cli.phase1_supervised.reviser import Reviser, conversation, history_of, run_revision_stage
from cai_cli.prompting.revision import critique_request


def critique(rows: Sequence[Sample], reviser: Reviser) -> list[Critique | Rejected]:
    """One critique of each row's reply under a drawn principle, in order."""
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


def command(
    input: options.Input,
    output: options.Output = "-",
    model: options.Model = options.DEFAULT_MODEL,
    constitution: options.Constitution = None,
    few_shot: options.FewShot = None,
    principles: options.Principles = None,
    max_principles: options.MaxPrinciples = None,
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
    """Criticise replies under principles drawn from the constitution.

    INPUT: Sample or Revision rows. Writes Critique rows, for `cai revise`.
    """
    run_revision_stage("critique", sample_or_revision, critique, locals())
