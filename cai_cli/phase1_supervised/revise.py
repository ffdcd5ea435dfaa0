"""`cai revise`: criticised replies -> revised replies (paper section 3.1), and the loop of both (`critique-revise`).

`critique-revise` draws a principle anew each round (default 4, as in the paper). `--no-critique` asks for the
revision directly (section 3.5). Departure: the paper keeps every revision it gets; here one that is empty, a critique
in disguise, wrapped or stuck in a loop is asked again and at last rejected with the reason.
"""

from collections.abc import Sequence

from cai_cli.cli import options
from cai_cli.common.errors import CaiError
from cai_cli.constitution.schema import CritiquePrinciple
from cai_cli.data.jsonl import rows_of
from cai_cli.data.schema import Critique, Rejected, Revision, RevisionRound, Sample, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.phase1_supervised.format_checks import revision_problem
from cai_cli.phase1_supervised.reviser import Reviser, conversation, history_of, run_revision_stage
from cai_cli.prompting.base import assistant
from cai_cli.prompting.revision import revision_request


def revise(rows: Sequence[Critique], reviser: Reviser) -> list[Revision | Rejected]:
    """One revision of each criticised reply under the principle of its critique, in order.

    Raises CaiError when a critique was made under a principle that this constitution does not hold.
    """
    known = {p.id: p for p in reviser.principles}
    for row in rows:
        if row.principle_id not in known:
            raise CaiError(
                f"row {row.key!r} was criticised under {row.principle_id!r}, which is not among the principles in use",
                hint="give the --constitution and --principles that `cai critique` had",
            )
    drawn = [known[row.principle_id] for row in rows]
    return _revised(rows, drawn, [row.critique for row in rows], reviser)


def revise_directly(rows: Sequence[Sample], reviser: Reviser) -> list[Revision | Rejected]:
    """One revision of each reply without a critique (paper section 3.5), under a principle drawn as for a critique."""
    drawn = [reviser.principle_for(row, len(history_of(row)) + 1) for row in rows]
    return _revised(rows, drawn, [None] * len(rows), reviser)


def _revised(
    rows: Sequence[Sample], drawn: Sequence[CritiquePrinciple], critiques: Sequence[str | None], reviser: Reviser
) -> list[Revision | Rejected]:
    rounds = [len(history_of(row)) + 1 for row in rows]
    requests = [
        revision_request(
            conversation(row),
            None if said is None else (principle.critique, said),
            principle.revision,
            reviser.examples,
            reviser.form,
        )
        for row, principle, said in zip(rows, drawn, critiques, strict=True)
    ]
    answers = reviser.answers(
        "revise", rows, rounds, requests, lambda i, text: revision_problem(text, drawn[i].revision)
    )
    outcomes: list[Revision | Rejected] = []
    for row, n, principle, said, answer in zip(rows, rounds, drawn, critiques, answers, strict=True):
        if isinstance(answer, RequestFailure):
            outcomes.append(reject(row.key, answer.reason, row))
            continue
        turn = RevisionRound(round=n, principle_id=principle.id, critique=said, response=row.reply)
        fields = row.sample_fields()
        fields |= {"completion": [assistant(answer.text.strip())], "finish_reason": answer.finish_reason}
        outcomes.append(Revision(**fields, history=[*history_of(row), turn]))
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
    """Revise criticised replies.

    INPUT: Critique rows, from `cai critique`. Writes Revision rows.
    """
    run_revision_stage("revise", rows_of(Critique), revise, locals())
