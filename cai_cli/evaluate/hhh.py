"""Accuracy on the published multiple-choice evaluations, such as HHH (`cai eval hhh`; paper section 2, appendix B).

A language model answers with the option of the highest log-probability after the prompt, normalised over the options.
A preference model answers with the conversation of the higher score. Departure: `--both-orders` puts each comparison a
second time with the two replies exchanged, and averages, so that a preference for a letter does not count as knowledge.

A tie counts as wrong; the number of ties is reported.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.data.evaluation_schema import EvaluationQuestion, EvaluationResult, OptionScores, parse_question
from cai_cli.data.jsonl import Numbered, read_rows, rows_of
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Rejected, content_hash, reason_kind, reject
from cai_cli.engines.base import Engine, RequestFailure
from cai_cli.evaluate.evaluated_models import EvaluatedModel, LanguageModel, PreferenceModel
from cai_cli.metrics.intervals import SHARE, Estimate, mean_estimate, percent
from cai_cli.models.loading import pick_device
from cai_cli.models.source import ModelSource
from cai_cli.prompting.base import resolve_prompt_format
from cai_cli.reward.preference_model import open_for_scores, preference_model_identity
from cai_cli.runtime.config import Effect, Group, Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import is_stdout, is_stream
from cai_cli.runtime.shared_options import (
    DEFAULT_MODEL,
    EngineOptions,
    FormatOptions,
    InputOptions,
    RunOptions,
)
from cai_cli.runtime.sinks import Outcome, StreamSink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

PM_BATCH = 16


class HhhConfig(RunOptions, InputOptions, EngineOptions, FormatOptions):
    """Measure accuracy on HHH and other published questions.

    FILE: questions with two or more options, rows with `prompt`, `corrects`, `incorrects`, and for --pm `text_correct`
    and `text_incorrect`.
    """

    input: str = option(
        ...,
        "Published evaluation file, or - for stdin.",
        Option(Effect.HASHED, Group.INPUT, metavar="FILE", reads_file=True, argument=True),
    )
    output: str | None = option(
        None,
        "Also write one row for each question: JSONL file, or - for stdout.",
        Option(Effect.HARMLESS, Group.OUTPUT, flags=("--output", "-o")),
    )
    model: str | None = option(  # type: ignore[assignment]
        None,
        f"Language model that answers; by default {DEFAULT_MODEL}.",
        Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")),
    )
    pm: str | None = option(
        None, "Preference model that scores, from `cai train-pm`.", Option(Effect.HASHED, Group.MODEL)
    )
    both_orders: bool = option(
        False, "Ask each comparison of two replies in both orders.", Option(flags=("--both-orders/--one-order",))
    )

    def check(self) -> None:
        super().check()
        if self.pm and (self.model or self.both_orders):
            raise UsageError(
                "--pm scores whole conversations: it takes neither --model nor --both-orders", code="option-conflict"
            )


# --- results ------------------------------------------------------------------------------------------------------


def hhh(questions: Sequence[EvaluationQuestion], model: EvaluatedModel) -> list[EvaluationResult | Rejected]:
    """Return one result for each question, in order."""
    return [
        reject(question.key, scores.reason, question)
        if isinstance(scores, RequestFailure)
        else _result(question, scores)
        for question, scores in zip(questions, model.answer(questions), strict=True)
    ]


def _result(question: EvaluationQuestion, orders: list[OptionScores]) -> EvaluationResult:
    # The lead of the most probable correct option over the most probable incorrect one, summed over the orders.
    lead = math.fsum(max(_p_of(scores, True)) - max(_p_of(scores, False)) for scores in orders)
    return EvaluationResult(
        id=question.key,
        askings=orders,
        p_correct=min(1.0, math.fsum(p for scores in orders for p in _p_of(scores, True)) / len(orders)),
        right=lead > 0,
        tie=lead == 0,
        source=question.source,
    )


def _p_of(scores: OptionScores, correct: bool) -> list[float]:
    return [p for p, is_correct in zip(scores.p, scores.correct, strict=True) if is_correct == correct]


def summarise(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Return the metrics of the results.

    Returns:
        `accuracy`, overall and `by_source`, with 95% intervals over questions; those by source are simultaneous.
        `chance`: the mean share of correct options. `p_correct`: mean probability of the correct options. `ties`: their
        number. `letters`: the share of answers in which each option was picked, which shows a preference for a letter;
        their intervals are simultaneous.
    """
    sources = sorted({r.source for r in results if r.source is not None})
    accuracy, chance = _accuracy(results), _chance(results)
    return {
        "accuracy": accuracy,
        "chance": chance,
        "above_chance": accuracy and accuracy["low"] > chance,
        "p_correct": mean_estimate([r.p_correct for r in results], SHARE),
        "ties": sum(r.tie for r in results),
        "letters": _letters(results),
        "by_source": {s: _accuracy([r for r in results if r.source == s], len(sources)) for s in sources},
    }


def _accuracy(results: Sequence[EvaluationResult], among: int = 1) -> Estimate | None:
    return mean_estimate([float(r.right) for r in results], SHARE, among=among)


def _letters(results: Sequence[EvaluationResult]) -> dict[str, Estimate | None]:
    """Return how often each option was picked; the answers to one question, asked in both orders, are one cluster."""
    picks = [(place, pick) for place, r in enumerate(results) for scores in r.askings if (pick := _pick(scores))]
    questions = [place for place, _ in picks]
    letters = sorted({option for r in results for scores in r.askings for option in scores.options})
    among = len(letters) if len(letters) > 2 else 1  # of two letters one determines the other
    return {
        letter.strip(" ()"): mean_estimate([float(pick == letter) for _, pick in picks], SHARE, questions, among)
        for letter in letters
    }


def _chance(results: Sequence[EvaluationResult]) -> float:
    shares = [sum(r.askings[0].correct) / len(r.askings[0].correct) for r in results]
    return math.fsum(shares) / max(1, len(shares))


def _pick(scores: OptionScores) -> str | None:
    top = max(scores.p)
    return scores.options[scores.p.index(top)] if scores.p.count(top) == 1 else None


def summary_lines(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield the metrics of `summarise` as lines of text."""
    accuracy: Estimate | None = metrics["accuracy"]
    if accuracy is None:
        yield "no question was answered"
        return
    where = "above" if metrics["above_chance"] else "below" if _below_chance(metrics) else None
    verdict = f"{where} chance" if where else "not distinguishable from chance"
    yield f"accuracy {percent(accuracy)} of {accuracy['n']:,} questions; chance {metrics['chance']:.1%}: {verdict}"
    ties = f"{metrics['ties']:,} ties, counted as wrong"
    yield f"mean probability of the correct option {percent(metrics['p_correct'])}; {ties}"
    for name, part, alone in (("picked", metrics["letters"], 2), ("accuracy on", metrics["by_source"], 1)):
        simultaneous = f" (simultaneous over {len(part)})" if len(part) > alone else ""
        for key, estimate in part.items():
            if estimate:
                yield f"{name} {console.safe(key)}: {percent(estimate)}{simultaneous}, n = {estimate['n']:,}"


def _below_chance(metrics: dict[str, Any]) -> bool:
    """Return whether the answers are worse than random ones; here a tie is a random answer, not a wrong one."""
    n, ties, chance = metrics["accuracy"]["n"], metrics["ties"], metrics["chance"]
    right = round(metrics["accuracy"]["value"] * n)
    expected = mean_estimate([1.0] * right + [chance] * ties + [0.0] * (n - right - ties), SHARE)
    return bool(expected and expected["high"] < chance)


# --- the command --------------------------------------------------------------------------------------------------


class SummarySink(StreamSink):
    """Keeps the results for the summary, and writes them where the output is a stream."""

    def __init__(self, output: str | None) -> None:
        super().__init__(output or "-")
        self.writes = output is not None
        self.results: list[EvaluationResult] = []

    def write(self, outcomes: Sequence[Outcome]) -> None:
        self.results += [o for o in outcomes if isinstance(o, EvaluationResult)]
        if self.writes:
            super().write(outcomes)
            return
        self.out = len(self.results)
        self.rejected.update(reason_kind(o.reason) for o in outcomes if isinstance(o, Rejected))


def _work_items(questions: Iterator[Numbered[EvaluationQuestion]]) -> WorkItems[EvaluationQuestion]:
    for line, question in questions:
        unnamed = question.model_dump(exclude={"id"}, exclude_unset=True)
        yield WorkItem(question.id, line, question, hashed_id=question.id == content_hash(unnamed))


def _preference_model(path: Path, batch_size: int, device: str) -> PreferenceModel:
    return PreferenceModel(*open_for_scores(path, pick_device(device)), batch_size)


def estimate(rows: RowFlow, config: HhhConfig) -> StepCost:
    """The cost of one request a question and order, or with --pm of scoring two conversations."""
    requests = 0 if config.pm else rows.rows * (2 if config.both_orders else 1)
    tokens = TokenCounts((requests or 2 * rows.rows) * rows.prompt_tokens)
    return StepCost(rows.rows, requests, tokens, rows)


def run(config: HhhConfig) -> dict[str, Any]:
    """Answer the questions of a file. Returns the summary. Raises CaiError."""
    model: EvaluatedModel
    engine: Engine | None = None
    settings = config.settings()
    if config.pm:
        base, batch_size = ModelSource.resolve(config.pm), config.batch_size or PM_BATCH
        model, window = _preference_model(base.path, batch_size, config.device), 4 * batch_size
        identity: dict[str, Any] = {"engine": "preference model", **preference_model_identity(base)}
    else:
        engine = config.open_engine(config.model or DEFAULT_MODEL)
        form = settings["prompt_format"] = resolve_prompt_format(config.prompt_format, engine)
        model, window, identity = LanguageModel(engine, form, config.both_orders), engine.batch_size, engine.identity()
    inputs = {"questions": hash_input(config.input)}
    reader = RowReader(skip_invalid=None)

    def parse(value: object) -> EvaluationQuestion:
        question = parse_question(value)
        model.check(question)
        return question

    stage_run = StageRun(
        provenance=provenance("eval hhh", inputs=inputs, settings=settings, model=identity),
        inputs=inputs,
        output=config.output or "",
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: _work_items(reader.rows(config.input, parse, config.limit)),
        work=lambda questions: hhh(questions, model),
        batch_size=window,
        total=expected_items(inputs["questions"], config.limit),
        engine=engine,
    )
    if config.output and not is_stream(config.output):
        summary = stage_run.complete()
        results = [row for _, row in read_rows(config.output, rows_of(EvaluationResult))]
    else:
        kept = SummarySink(config.output)
        summary, results = stage_run.complete(kept), kept.results
    summary = {**summary, **summarise(results)}
    _report(summary, config.output, as_json=config.as_json)
    refuse_all_rejected(summary)
    return summary


def _report(summary: dict[str, Any], output: str | None, *, as_json: bool) -> None:
    print_summary(summary, as_json=as_json, stdout_is_data=is_stdout(output or ""))
    if as_json:
        return
    for line in summary_lines(summary):
        if is_stdout(output or ""):
            console.say(line)
        else:
            print(line)


STAGE = Stage(
    "eval hhh",
    Phase.EVALUATION,
    HhhConfig,
    run,
    estimate,
    reads=(EvaluationQuestion,),
    writes=EvaluationResult,
)
