"""`cai label-prefs`: samples -> preference pairs labelled by a model under principles (paper section 4.1).

The feedback model is shown a pair as a multiple-choice question and its label is the normalised log-probability of
the options, not a parsed letter. One principle is drawn per comparison. Departure: the paper asks once; here every
pair is asked in both orders by default and the two answers are averaged, so a liking for the first position cancels
instead of becoming a preference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, islice
from typing import Annotated, Literal

import typer

from cai_cli import options
from cai_cli.constitution import (
    ComparisonExample,
    PreferenceConstitution,
    PreferencePrinciple,
    draw,
    open_constitution,
    select,
)
from cai_cli.engines import open_engine
from cai_cli.engines.base import Engine, Question, Refusal
from cai_cli.errors import BadRow
from cai_cli.jsonl import KeyTable, read_rows, shown
from cai_cli.manifest import hash_input, provenance, settings_of
from cai_cli.phase1_supervised.reviser import sample_or_revision
from cai_cli.prompts import OPTIONS, Form, comparison_request, pick_form
from cai_cli.records import Message, Preference, Rejected, Row, Sample, Vote, reject
from cai_cli.stage import Job, Skip, Unit, Units

Order = Literal["ab", "ba"]


class Pair(Row):
    """Two replies to one prompt; `id` names the prompt and the two sample indices."""

    id: str
    prompt: list[Message]
    a: list[Message]
    b: list[Message]
    source: str | None

    @property
    def key(self) -> str:
        return self.id


@dataclass(frozen=True)
class Labeller:
    """A feedback model that compares replies under principles."""

    engine: Engine
    principles: Sequence[PreferencePrinciple]
    examples: Sequence[ComparisonExample]
    form: Form
    orders: tuple[Order, ...]
    seed: int


def label_prefs(pairs: Sequence[Pair], labeller: Labeller) -> list[Preference | Rejected]:
    """One preference per pair, in order: `p_chosen` is the mean over the orders asked. Ties are rejected."""
    asked = [(pair, order) for pair in pairs for order in labeller.orders]
    drawn = {pair.id: draw(labeller.principles, labeller.seed, "comparison", pair.id) for pair in pairs}
    questions = []
    for pair, order in asked:
        replies = [pair.a[0].content, pair.b[0].content]
        request = comparison_request(
            pair.prompt,
            drawn[pair.id].comparison,
            replies if order == "ab" else replies[::-1],
            labeller.examples,
            labeller.form,
        )
        questions.append(Question(request.text, OPTIONS, request.cue))
    answers = iter(labeller.engine.score(questions))
    return [
        _preference(pair, drawn[pair.id].id, labeller.orders, list(islice(answers, len(labeller.orders))))
        for pair in pairs
    ]


def _preference(
    pair: Pair, principle_id: str, orders: Sequence[Order], answers: Sequence[list[float] | Refusal]
) -> Preference | Rejected:
    for answer in answers:
        if isinstance(answer, Refusal):
            return reject(pair.key, answer.reason, pair)
    firsts = [first_share(answer) for answer in answers if not isinstance(answer, Refusal)]
    p_a = math.fsum(p if order == "ab" else 1 - p for order, p in zip(orders, firsts, strict=True)) / len(orders)
    if p_a == 0.5:
        return reject(pair.key, "tie", pair)
    a_wins = p_a > 0.5
    votes = [
        # "ab" in a vote means that the chosen reply stood first.
        Vote(
            principle_id=principle_id,
            method="choice",
            order="ab" if (order == "ab") == a_wins else "ba",
            p_first=p,
            rationale=None,
        )
        for order, p in zip(orders, firsts, strict=True)
    ]
    return Preference(
        id=pair.id,
        prompt=pair.prompt,
        chosen=pair.a if a_wins else pair.b,
        rejected=pair.b if a_wins else pair.a,
        p_chosen=p_a if a_wins else 1 - p_a,
        votes=votes,
        human=None,
        source=pair.source,
    )


def first_share(logprobs: Sequence[float]) -> float:
    """The probability of the first of two options, normalised over both (paper section 4.1), from natural logs."""
    first, second = logprobs
    return 1 / (1 + math.exp(min(second - first, 700.0)))


def pair_units(source: str, limit: int | None) -> Units[Pair]:
    """All pairs of the samples of each prompt. Rows of one prompt must stand together, as `cai sample` writes them.

    Raises BadRow where they do not, or where one stands twice: pairs would be missing, or be no pairs.
    """
    rows, prompts = islice(read_rows(source, sample_or_revision), limit), KeyTable()
    name = shown(source)
    for prompt_id, group in groupby(rows, key=lambda numbered: numbered[1].id):
        samples = list(group)
        line = samples[0][0]
        if first := prompts.add(prompt_id, line):
            raise BadRow(name, line, f"more replies to {prompt_id!r}, after those of line {first}", "sort by id")
        lines: dict[str, int] = {}
        for line, sample in samples:
            if lines.setdefault(sample.key, line) != line:
                raise BadRow(name, line, f"{sample.key!r} stands on line {lines[sample.key]} already")
        if len(samples) == 1:
            yield Skip("only one reply to the prompt", samples[0][0])
        for (line, a), (_, b) in combinations(samples, 2):
            if a.completion == b.completion:
                yield Skip("identical replies", line)
            else:
                yield Unit(_pair_id(a, b), line, _pair(a, b))


def _pair_id(a: Sample, b: Sample) -> str:
    return f"{a.id}/{a.sample_index}-{b.sample_index}"


def _pair(a: Sample, b: Sample) -> Pair:
    return Pair(id=_pair_id(a, b), prompt=a.prompt, a=a.completion, b=b.completion, source=a.source)


def command(
    input: options.Input,
    output: options.Output = "-",
    model: options.Model = options.DEFAULT_MODEL,
    constitution: options.Constitution = None,
    few_shot: options.FewShot = None,
    principles: options.Principles = None,
    max_principles: options.MaxPrinciples = None,
    both_orders: Annotated[
        bool, typer.Option("--both-orders/--one-order", help="Ask each pair in both orders and average.")
    ] = True,
    prompt_form: options.PromptForm = "auto",
    seed: options.Seed = 0,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Label pairs of replies with a model's preference.

    INPUT: Sample (or Revision) rows with two or more replies a prompt. Writes Preference rows.
    """
    flags = locals()
    loaded = open_constitution(PreferenceConstitution, constitution, few_shot)
    engine = open_engine(model, batch_size=batch_size, device=device, dtype=dtype)
    inputs = {"samples": hash_input(input)}
    form = pick_form(prompt_form, engine)
    orders: tuple[Order, ...] = ("ab", "ba") if both_orders else ("ab",)
    chosen = select(loaded.principles, principles, max_principles)
    labeller = Labeller(engine, chosen, loaded.examples, form, orders, seed)
    Job(
        provenance=provenance(
            "label-prefs",
            inputs=inputs,
            settings=settings_of(flags, prompt_form=form),
            model=engine.identity(),
            constitution={"name": loaded.name, "fingerprint": loaded.fingerprint()},
        ),
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        units=lambda: pair_units(input, limit),
        work=lambda pairs: label_prefs(pairs, labeller),
        window=engine.batch_size,
    ).run(as_json=json)
