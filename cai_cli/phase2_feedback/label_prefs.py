"""`cai label-prefs`: pairs of replies -> preferences labelled by a model under principles (paper section 4.1).

The label is a probability, the mean of votes: one per principle, order and rationale. As in the paper a principle is
drawn per comparison, `--principles-per-pair` asks under several (the paper: ensembling over principles makes the
preference model more robust), and a chain of thought is clamped to 40-60%. Departure: the paper asks each question
once; here every pair is asked in both orders by default, so that a liking for the first position cancels instead of
becoming a preference, and a principle counts only where all its orders were answered.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from cai_cli.cli import options
from cai_cli.common.errors import UsageError
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import TIE, UNSURE, Preference, Rejected, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.labeller import labeller_settings, open_labeller
from cai_cli.judging.pairs import PAIRINGS, Pair, pair_units
from cai_cli.judging.vote_cache import RecordedVotes
from cai_cli.judging.votes import Labeller, PairVerdict, aggregate_votes
from cai_cli.metrics.label_audit import LabelAudit, audit_file, say_audit
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.sinks import StdoutSink
from cai_cli.runtime.stage_run import StageRun
from cai_cli.runtime.summary import print_summary


def label_prefs(pairs: Sequence[Pair], labeller: Labeller) -> list[Preference | Rejected]:
    """One preference per pair, in order. A tie, a pair without a vote and one under `min_confidence` are rejected,
    each with its reason."""
    return [
        _preference(pair, opinion, labeller)
        for pair, opinion in zip(pairs, aggregate_votes(pairs, labeller), strict=True)
    ]


def _preference(pair: Pair, opinion: PairVerdict | RequestFailure, labeller: Labeller) -> Preference | Rejected:
    if isinstance(opinion, RequestFailure):
        return reject(pair.key, opinion.reason, pair)
    labelled = _labelled(pair, opinion, labeller.judge.method)
    # Rejected with their votes: to the audit a tie is often a judge that changed its mind.
    if opinion.p_a == 0.5:
        return reject(pair.key, TIE, labelled)
    if labelled.p_chosen < labeller.min_confidence:
        return reject(pair.key, UNSURE, labelled)
    return labelled


def _labelled(pair: Pair, opinion: PairVerdict, method: str) -> Preference:
    a_wins = opinion.p_a > 0.5
    votes = opinion.as_rows(method)
    if not a_wins:  # "ab" in a vote on a preference means that the chosen reply stood first
        votes = [vote.model_copy(update={"order": "ba" if vote.order == "ab" else "ab"}) for vote in votes]
    return Preference(
        id=pair.id,
        prompt=pair.prompt,
        chosen=pair.a if a_wins else pair.b,
        rejected=pair.b if a_wins else pair.a,
        p_chosen=opinion.p_a if a_wins else 1 - opinion.p_a,
        votes=votes,
        human=None if pair.human is None else "chosen" if (pair.human == "a") == a_wins else "rejected",
        source=pair.source,
    )


def command(
    input: options.Input,
    output: options.Output = "-",
    model: options.Model = options.DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="choice, cot, contrast or verdict.")] = "choice",
    constitution: options.Constitution = None,
    few_shot: options.FewShot = None,
    principles: options.Principles = None,
    max_principles: options.MaxPrinciples = None,
    principles_per_pair: Annotated[
        str, typer.Option(help="Principles drawn for each pair, whose votes are averaged: a number, or all.")
    ] = "1",
    pairs: Annotated[
        str,
        typer.Option(
            help="Of the replies to one prompt: all pairs, a random pairing (each reply in one pair), or best-vs-rest"
            " (rows of `cai score`)."
        ),
    ] = "all",
    both_orders: Annotated[
        bool, typer.Option("--both-orders/--one-order", help="GenerationRequest each pair in both orders and average.")
    ] = True,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Take out the liking for a letter that empty pairs show.")
    ] = False,
    clamp: Annotated[
        str | None, typer.Option(help="LOW,HIGH: limits of each probability; by default 0.4,0.6 for cot, else none.")
    ] = None,
    cot_samples: Annotated[int, typer.Option(min=1, help="Chains of thought per question, averaged.")] = 1,
    min_confidence: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Reject pairs whose p_chosen is below this.")
    ] = 0.5,
    votes: Annotated[
        str | None,
        typer.Option(
            help="An earlier output: what its judge said, asked the same under wider limits, is not asked again."
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
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
    """Label pairs of replies with a model's preference.

    INPUT: Sample (or Revision) rows with two or more replies a prompt, or pairs: HH-RLHF rows, Preference rows. Writes
    Preference rows.
    """
    flags = locals()
    reader = RowReader.of(flags)
    if pairs not in PAIRINGS:
        raise UsageError(f"--pairs must be one of {', '.join(PAIRINGS)}, not {pairs!r}")
    labeller, loaded = open_labeller(flags)
    engine = labeller.judge.engine
    inputs = {"samples": hash_input(input)} | ({"votes": hash_input(votes)} if votes else {})
    made_by = provenance(
        "label-prefs",
        inputs=inputs,
        settings=labeller_settings(flags, labeller),
        model=engine.identity(),
        constitution={"name": loaded.name, "fingerprint": loaded.fingerprint()},
    )
    if votes:
        labeller = replace(labeller, recorded=RecordedVotes(votes, made_by))
    job = StageRun(
        provenance=made_by,
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        reader=reader,
        units=lambda: pair_units(reader, input, pairs, seed, limit),
        work=lambda some: label_prefs(some, labeller),
        window=engine.batch_size,
        engine=engine,
    )
    label_audit = LabelAudit()
    summary = job.complete(StdoutSink(label_audit.add) if output == "-" else None)
    found = label_audit.audit() if output == "-" else audit_file(output)
    print_summary({**summary, "audit": found}, as_json=json, stdout_is_data=output == "-")
    if summary["out"] or summary["rejected"]:
        say_audit(found)
