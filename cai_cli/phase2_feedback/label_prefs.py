"""`cai label-prefs`: pairs of replies -> preferences labelled by a model under principles (paper section 4.1).

The label is a probability, the mean of votes: one per principle, order and rationale. As in the paper a principle is
drawn per comparison, `--principles-per-pair` asks under several (the paper: ensembling over principles makes the
preference model more robust), and a chain of thought is clamped to 40-60%. Departure: the paper asks each question
once; here every pair is asked in both orders by default, so that a liking for the first position cancels instead of
becoming a preference, and a principle counts only where all its orders were answered.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from cai_cli import options
from cai_cli.constitution import PreferenceConstitution, PreferencePrinciple, open_constitution, select
from cai_cli.engines import engine_of
from cai_cli.engines.base import Refusal, Sampling, seed_for
from cai_cli.errors import UsageError
from cai_cli.evaluate.agreement import Tally, audit_file, say_audit
from cai_cli.intake import Intake
from cai_cli.manifest import hash_input, provenance, settings_of
from cai_cli.phase2_feedback.judging import METHODS, Comparison, Judge, Judgement, Order
from cai_cli.phase2_feedback.pairs import PAIRINGS, Pair, pair_units
from cai_cli.phase2_feedback.recorded_votes import RecordedVotes
from cai_cli.prompts import pick_form
from cai_cli.records import TIE, UNSURE, Preference, Rejected, Vote, reject
from cai_cli.sinks import StdoutSink
from cai_cli.stage import Job, print_summary

Answers = Sequence[tuple[Comparison, Judgement | Refusal]]


@dataclass(frozen=True)
class Labeller:
    """A judge, the principles it draws from and how often it is asked."""

    judge: Judge
    principles: Sequence[PreferencePrinciple]
    per_pair: int
    orders: tuple[Order, ...]
    samples: int = 1
    min_confidence: float = 0.5
    recorded: RecordedVotes | None = None

    def judge_all(self, comparisons: Sequence[Comparison]) -> list[Judgement | Refusal]:
        """One judgement per comparison, in order; what is recorded is not asked."""
        known = [self.recorded.judgement(one) if self.recorded else None for one in comparisons]
        answers = iter(self.judge.judge([one for one, said in zip(comparisons, known, strict=True) if said is None]))
        return [next(answers) if said is None else self.judge.clamped(said) for said in known]

    def comparisons(self, pair: Pair) -> Iterator[Comparison]:
        """All that is asked about one pair. The principles drawn for it depend on the seed and the pair alone."""
        drawn = sorted(self.principles, key=lambda p: seed_for(self.judge.seed, "comparison", pair.id, p.id))
        for principle in drawn[: self.per_pair]:
            for order in self.orders:
                for sample in range(self.samples):
                    yield Comparison(pair, principle, order, sample)


@dataclass(frozen=True)
class Weighed:
    """A judge's opinion of one pair: the mean probability that `a` is the better reply, and the votes behind it."""

    p_a: float
    votes: Sequence[tuple[Comparison, Judgement]]

    def as_rows(self, method: str) -> list[Vote]:
        """The votes as a row holds them, "ab" where `a` stood first."""
        return [
            Vote(
                principle_id=c.principle.id,
                method=method,
                order=c.order,
                p_first=judgement.p_first,
                rationale=judgement.rationale,
            )
            for c, judgement in self.votes
        ]


def label_prefs(pairs: Sequence[Pair], labeller: Labeller) -> list[Preference | Rejected]:
    """One preference per pair, in order. A tie, a pair without a vote and one under `min_confidence` are rejected,
    each with its reason."""
    return [_preference(pair, opinion, labeller) for pair, opinion in zip(pairs, weigh(pairs, labeller), strict=True)]


def weigh(pairs: Sequence[Pair], labeller: Labeller) -> list[Weighed | Refusal]:
    """One opinion per pair, in order; a Refusal where no principle was answered in all its orders."""
    asked = [list(labeller.comparisons(pair)) for pair in pairs]
    answers = iter(labeller.judge_all([comparison for group in asked for comparison in group]))
    return [_weighed([(c, next(answers)) for c in group], labeller) for group in asked]


def _weighed(answers: Answers, labeller: Labeller) -> Weighed | Refusal:
    votes: list[tuple[Comparison, Judgement]] = []
    shares = []
    for start in range(0, len(answers), len(labeller.orders) * labeller.samples):
        one_principle = answers[start : start + len(labeller.orders) * labeller.samples]
        answered = [(c, judgement) for c, judgement in one_principle if isinstance(judgement, Judgement)]
        of_orders = [[_p_a(c, j) for c, j in answered if c.order == order] for order in labeller.orders]
        if all(of_orders):
            votes += answered
            shares.append(math.fsum(math.fsum(p) / len(p) for p in of_orders) / len(of_orders))
    if not shares:
        return next(judgement for _, judgement in answers if isinstance(judgement, Refusal))
    return Weighed(math.fsum(shares) / len(shares), votes)


def _preference(pair: Pair, opinion: Weighed | Refusal, labeller: Labeller) -> Preference | Rejected:
    if isinstance(opinion, Refusal):
        return reject(pair.key, opinion.reason, pair)
    labelled = _labelled(pair, opinion, labeller.judge.method)
    # Rejected with their votes: to the audit a tie is often a judge that changed its mind.
    if opinion.p_a == 0.5:
        return reject(pair.key, TIE, labelled)
    if labelled.p_chosen < labeller.min_confidence:
        return reject(pair.key, UNSURE, labelled)
    return labelled


def _p_a(comparison: Comparison, judgement: Judgement) -> float:
    return judgement.p_first if comparison.order == "ab" else 1 - judgement.p_first


def _labelled(pair: Pair, opinion: Weighed, method: str) -> Preference:
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


def pick_per_pair(wanted: str, principles: Sequence[PreferencePrinciple]) -> int:
    """`--principles-per-pair` as a number. Raises UsageError."""
    if wanted == "all":
        return len(principles)
    if not wanted.isdecimal() or not 1 <= int(wanted) <= len(principles):
        raise UsageError(
            f"--principles-per-pair must be all or a number from 1 to {len(principles)}, not {wanted!r}",
            hint=f"{len(principles)} principles are in use",
        )
    return int(wanted)


def pick_clamp(wanted: str | None, method: str) -> tuple[float, float]:
    """`--clamp LOW,HIGH`; by default 0.4,0.6 for cot (paper section 4.1), else none. Raises UsageError."""
    if wanted is None:
        return (0.4, 0.6) if method == "cot" else (0.0, 1.0)
    try:
        low, high = (float(part) for part in wanted.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= 0.5 <= high <= 1:
        raise UsageError(f"--clamp must be LOW,HIGH with 0 <= LOW <= 0.5 <= HIGH <= 1, not {wanted!r}")
    return low, high


def open_labeller(flags: Mapping[str, Any]) -> tuple[Labeller, PreferenceConstitution]:
    """The judge that the options of a command describe, and the constitution it goes by.

    Raises UsageError, CaiError.
    """
    method, calibrate, cot_samples = flags["method"], flags["calibrate"], flags["cot_samples"]
    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, not {method!r}")
    if calibrate and method != "choice":
        raise UsageError(f"--calibrate needs --method choice, not {method}")
    if method == "contrast" and flags["few_shot"] not in (None, "none"):
        raise UsageError("--method contrast shows the judge no examples, so --few-shot would do nothing")
    if cot_samples > 1 and method != "cot":
        raise UsageError("--cot-samples needs --method cot")
    limits = pick_clamp(flags["clamp"], method)
    loaded = open_constitution(PreferenceConstitution, flags["constitution"], flags["few_shot"])
    chosen = select(loaded.principles, flags["principles"], flags["max_principles"])
    per_pair = pick_per_pair(flags["principles_per_pair"], chosen)
    engine = engine_of(flags)
    form = pick_form(flags["prompt_form"], engine)
    # A verdict is read greedily: noise of sampling would be taken for the judge's doubt.
    temperature = 0.0 if method == "verdict" else flags["temperature"]
    sampling = Sampling(flags["max_new_tokens"], temperature, flags["top_p"])
    judge = Judge(engine, method, loaded.examples, form, flags["seed"], sampling, limits, calibrate)
    # The order in which replies are shown means nothing to a contrast: nobody is shown two.
    orders: tuple[Order, ...] = ("ab", "ba") if flags["both_orders"] and method != "contrast" else ("ab",)
    return Labeller(judge, chosen, per_pair, orders, cot_samples, flags["min_confidence"]), loaded


def labeller_settings(flags: Mapping[str, Any], labeller: Labeller) -> dict[str, Any]:
    """`flags` as a manifest records them."""
    judge = labeller.judge
    return settings_of(flags, prompt_form=judge.form, clamp=list(judge.clamp), principles_per_pair=labeller.per_pair)


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
        bool, typer.Option("--both-orders/--one-order", help="Ask each pair in both orders and average.")
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
    prompt_form: options.PromptForm = "auto",
    seed: options.Seed = 0,
    limit: options.Limit = None,
    shard: options.Shard = None,
    skip_bad: options.SkipBad = False,
    max_bad: options.MaxBad = None,
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
    intake = Intake.of(flags)
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
    job = Job(
        provenance=made_by,
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        intake=intake,
        units=lambda: pair_units(intake, input, pairs, seed, limit),
        work=lambda some: label_prefs(some, labeller),
        window=engine.batch_size,
        engine=engine,
    )
    tally = Tally()
    summary = job.complete(StdoutSink(tally.add) if output == "-" else None)
    found = tally.audit() if output == "-" else audit_file(output)
    print_summary({**summary, "audit": found}, as_json=json, stdout_is_data=output == "-")
    if summary["out"] or summary["rejected"]:
        say_audit(found)
