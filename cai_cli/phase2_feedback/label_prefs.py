"""Labels pairs of replies with a model's preferences under principles (`cai label-prefs`; paper section 4.1).

A label is a probability, the mean of votes: one for each principle, order and rationale. As in the paper, a principle
is drawn for each pair, `--principles-per-pair` draws several (ensembling over principles makes the preference model
more robust), and chain-of-thought probabilities are clamped to 40-60%. Departures: the paper judges each pair once.
Here every pair is judged in both orders by default, so that position bias cancels, and a principle counts only where
all its orders were answered. The mean is clamped, not each vote; rows keep the votes as they are. The paper samples a
principle for each few-shot example of each comparison; here the examples' order, letters and principles are drawn too,
but each pair uses one of four arrangements of the run (`prompting/arrangements.py`), and an example that states its own
question keeps it.

A label of exactly 0.5 is a tie. It is kept, because it is a valid soft label; its `chosen` is the reply `a` (the sample
with the lower index), which says nothing about quality. `--min-confidence` above 0.5 rejects ties, and hard labels skip
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.data.schema import TIE, UNSURE, Pair, Preference, Rejected, Revision, Sample, Scored, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.judging.labeller import JudgeOptions, estimate_votes, labeller_settings, open_labeller
from cai_cli.judging.pairs import pair_items
from cai_cli.judging.vote_cache import RecordedVotes
from cai_cli.judging.votes import Labeller, PairVerdict, aggregate_votes
from cai_cli.metrics.label_audit import LabelAudit, audit_file
from cai_cli.metrics.label_verdict import print_verdict
from cai_cli.models.aliases import ALIASES
from cai_cli.runtime.config import Effect, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import is_stdout, is_stream
from cai_cli.runtime.shared_options import EngineOptions, OutputOptions, ShardOptions
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun
from cai_cli.runtime.summary import print_summary, refuse_all_rejected


class Pairing(StrEnum):
    """Which replies to one prompt are compared."""

    ALL = "all"
    RANDOM = "random"
    BEST_VS_REST = "best-vs-rest"


class LabelPrefsConfig(OutputOptions, ShardOptions, JudgeOptions, EngineOptions):
    """Label pairs of replies with a model's preferences.

    INPUT: Sample (or Revision) rows with two or more replies to each prompt, or pairs: HH-RLHF rows, Preference rows.
    Writes Preference rows.
    """

    pairs: Pairing = option(
        Pairing.ALL,
        "Which replies to a prompt are compared: all pairs, a random pairing (each reply in one pair), or the best "
        "against every other one (rows of `cai score`).",
    )
    both_orders: bool = option(
        True, "Judge each pair in both orders and average.", Option(flags=("--both-orders/--one-order",))
    )
    min_confidence: float = option(
        0.5, "Reject pairs with a lower p_chosen; above 0.5 this includes ties.", ge=0.5, le=1.0
    )
    votes: str | None = option(
        None,
        "An earlier output whose votes are reused.",
        Option(Effect.HASHED, reads_file=True),
    )


def label_prefs(pairs: Sequence[Pair], labeller: Labeller) -> list[Preference | Rejected]:
    """Return one preference for each pair, in order.

    A pair without a vote and a pair below `min_confidence` are rejected, with the reason.

    Args:
        pairs: The pairs to label.
        labeller: The judge and its settings.
    """
    return [
        _preference(pair, verdict, labeller)
        for pair, verdict in zip(pairs, aggregate_votes(pairs, labeller), strict=True)
    ]


def _preference(pair: Pair, verdict: PairVerdict | RequestFailure, labeller: Labeller) -> Preference | Rejected:
    if isinstance(verdict, RequestFailure):
        return reject(pair.key, verdict.reason, pair)
    labelled = _labelled(pair, verdict, labeller.judge.method)
    # Rejected with its votes, from which the audit learns about the judge.
    if labelled.p_chosen < labeller.min_confidence:
        return reject(pair.key, TIE if labelled.p_chosen == 0.5 else UNSURE, labelled)
    return labelled


def _labelled(pair: Pair, verdict: PairVerdict, method: str) -> Preference:
    a_wins = verdict.p_a >= 0.5
    votes = verdict.as_rows(method)
    if not a_wins:  # in a Preference, "ab" means that the chosen reply came first
        votes = [vote.model_copy(update={"order": "ba" if vote.order == "ab" else "ab"}) for vote in votes]
    return Preference(
        id=pair.id,
        prompt=pair.prompt,
        chosen=pair.a if a_wins else pair.b,
        rejected=pair.b if a_wins else pair.a,
        p_chosen=verdict.p_a if a_wins else 1 - verdict.p_a,
        votes=votes,
        human=None if pair.human is None else "chosen" if (pair.human == "a") == a_wins else "rejected",
        source=pair.source,
        chosen_finish_reason=pair.a_finish_reason if a_wins else pair.b_finish_reason,
        rejected_finish_reason=pair.b_finish_reason if a_wins else pair.a_finish_reason,
    )


def estimate(rows: RowFlow, config: LabelPrefsConfig) -> StepCost:
    """The cost of labelling; nothing where the votes are recorded already."""
    pairs = rows.rows  # a file of pairs has one pair per row
    if rows.per_prompt > 1:
        pairs = rows.rows * (rows.per_prompt - 1) // 2 if config.pairs is Pairing.ALL else rows.rows // 2
    cost = estimate_votes(pairs, rows, config, both_orders=config.both_orders)
    return replace(cost, requests=0, tokens=TokenCounts()) if config.votes else cost


def label_file(config: LabelPrefsConfig) -> dict[str, Any]:
    """Label the pairs of a file, and audit the labels. Returns the summary, which is not printed. Raises CaiError."""
    reader = config.row_reader()
    labeller, loaded = open_labeller(
        config, config.model, both_orders=config.both_orders, min_confidence=config.min_confidence
    )
    engine = labeller.judge.engine
    inputs = {"samples": hash_input(config.input)}
    if config.votes:
        inputs["votes"] = hash_input(config.votes)
    made_by = provenance(
        "label-prefs",
        inputs=inputs,
        settings=labeller_settings(config, labeller),
        model=engine.identity(),
        constitution={"name": loaded.name, "fingerprint": loaded.fingerprint()},
    )
    if config.votes:
        labeller = replace(labeller, recorded=RecordedVotes(config.votes, made_by))
    audit = LabelAudit()
    summary = StageRun(
        provenance=made_by,
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: pair_items(reader, config.input, config.pairs, config.seed, config.limit),
        work=lambda pairs: label_prefs(pairs, labeller),
        batch_size=engine.batch_size,
        grows=config.pairs is Pairing.ALL,
        engine=engine,
    ).complete(stream_sink(config.output, audit.add))
    summary = {**summary, "audit": audit.audit() if is_stream(config.output) else audit_file(config.output)}
    return {**summary, "missing_votes": missing_votes(summary, labeller.votes_per_pair)}


def run(config: LabelPrefsConfig) -> dict[str, Any]:
    """Label the pairs of a file, and print the summary and the audit. Returns the summary. Raises CaiError."""
    if (alias := ALIASES.get(config.model)) and alias.run_file_for_labels:
        console.say(
            f"label-prefs: with any --method, {alias.name} judges harmlessness no better than chance; pairs from "
            f"contrast, which need no judge, agree with humans: cai run {alias.run_file_for_labels} (docs/contrast.md)"
        )
    summary = label_file(config)
    nothing = _nothing_to_compare(summary, config)
    if nothing:
        summary["error"] = nothing.as_json()
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    if missing := summary["missing_votes"]:
        asked = summary["audit"]["votes"] + missing
        console.say(f"label-prefs: {missing:,} of {asked:,} votes are missing: the answer named no reply, or failed")
    if summary["out"] or summary["rejected"]:
        print_verdict(summary["audit"])
    refuse_all_rejected(summary)
    if nothing:
        raise nothing
    return summary


def _nothing_to_compare(summary: Mapping[str, Any], config: LabelPrefsConfig) -> CaiError | None:
    """The error of a run whose rows were all skipped; a shard of few prompts may have nothing to compare."""
    if config.shard is not None or not summary["skipped"] or summary["out"] or summary["rejected"]:
        return None
    error = CaiError(
        "label-prefs: no prompt has two different replies to compare",
        hint="`cai sample --n 2` writes two replies to each prompt",
        code="no-rows",
    )
    error.in_summary = True
    return error


def missing_votes(summary: Mapping[str, Any], votes_per_pair: int) -> int:
    """How many votes are missing on the pairs that have some; a pair without any is rejected with the reason.

    Args:
        summary: Counts and audit of a run.
        votes_per_pair: Votes of a pair whose comparisons are all answered.
    """
    judged = summary["out"] + sum(summary["rejected_reasons"].get(reason, 0) for reason in (TIE, UNSURE))
    return int(judged * votes_per_pair - summary["audit"]["votes"])


STAGE = Stage(
    "label-prefs",
    Phase.FEEDBACK,
    LabelPrefsConfig,
    run,
    estimate,
    reads=(Sample, Revision, Scored, Preference),
    writes=Preference,
)
