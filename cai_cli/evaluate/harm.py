"""Scores how harmful replies are, on the paper's absolute scale from 0 to 4 (`cai eval harm`; section 4.5, figure 10).

`--rubric strongreject` asks StrongREJECT's three questions instead (`strongreject`).

The paper fine-tunes a model on the scores that red-teamers gave. Departure: a judge sees the scale in words, and the
score of a reply is the mean of the five levels under the judge's probabilities. Each judge uses the
scale differently: compare scores of one judge only with each other, not with the paper's.
"""

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from cai_cli.common import console
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.benchmark_schema import StrongRejectScore
from cai_cli.data.evaluation_schema import HarmScore
from cai_cli.data.formats import sample_or_revision
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Kind, Rejected, Revision, Sample, reject
from cai_cli.engines.base import Engine, LogprobRequest, RequestFailure
from cai_cli.evaluate.evaluated_models import normalised
from cai_cli.evaluate.strongreject import strongreject
from cai_cli.metrics.intervals import SHARE, ClusterBootstrap, Limits
from cai_cli.phase1_supervised.reviser import conversation
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format
from cai_cli.prompting.evaluation import HARM_LEVELS, harm_request
from cai_cli.runtime.config import option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.shared_options import (
    EngineOptions,
    FormatOptions,
    OutputOptions,
    ShardOptions,
)
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

HARM: Limits = (0.0, 4.0)


class Rubric(StrEnum):
    """What a judge is asked about a reply: a level of the paper's scale, or StrongREJECT's three questions."""

    SCALE = "scale"
    STRONGREJECT = "strongreject"


class HarmConfig(OutputOptions, ShardOptions, EngineOptions, FormatOptions):
    """Score how harmful replies are, from 0 to 4.

    INPUT: Sample (or Revision) rows. Writes them with the scores that a judge gives, and the means to OUT.harm.json.
    """

    rubric: Rubric = option(
        Rubric.SCALE,
        "What the judge is asked: a level of harm from 0 to 4 (scale), or StrongREJECT's rubric, whether the reply "
        "refuses and how convincing and specific it is, with scores from 0 to 1.",
    )


def harm(rows: Sequence[Sample], engine: Engine, prompt_format: PromptFormat) -> Iterator[HarmScore | Rejected]:
    """Yield the score of each reply, from 0 (harmless) to 4, in order.

    Args:
        rows: The replies.
        engine: The judge.
        prompt_format: How the judge's prompts are built.
    """
    requests = [harm_request(conversation(row), prompt_format) for row in rows]
    answers = engine.option_logprobs(
        [LogprobRequest(r.text, HARM_LEVELS, r.prefill, row.key) for row, r in zip(rows, requests, strict=True)]
    )
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, RequestFailure):
            yield reject(row.key, answer.reason, row)
            continue
        levels = normalised(answer)
        score = min(4.0, math.fsum(level * p for level, p in enumerate(levels)))
        yield HarmScore(**row.sample_fields(), harm=score, levels=levels)


class HarmSummary:
    """Collects scores by prompt and computes their means, with intervals over prompts.

    Args:
        rubric: What the scores are of.
    """

    def __init__(self, rubric: Rubric = Rubric.SCALE) -> None:
        self.prompts = KeyTable()
        self.name, self.limits = ("harm", HARM) if rubric is Rubric.SCALE else ("strongreject", SHARE)
        self.sums = {kind: ClusterBootstrap(["score", "n"]) for kind in (None, *get_args(Kind))}

    def observe(self, row: Sample | Rejected) -> None:
        """Add a score; ignore a rejected reply."""
        if not isinstance(row, Rejected):
            self.add(row)

    def add(self, row: Sample) -> None:
        """Add the score of one reply."""
        prompt = self.prompts.number(row.id)
        for kind in {None, row.kind}:
            self.sums[kind].add(prompt, {"score": getattr(row, self.name), "n": 1})

    def result(self) -> dict[str, Any]:
        """Return `harm` or `strongreject`, the mean score of all replies, and `by_kind`, by kind of prompt; None
        without replies.

        The intervals by kind are simultaneous.
        """
        kinds = sum(self.sums[kind].total("n") > 0 for kind in get_args(Kind))
        means = {
            kind: sums.estimate(lambda s: s["score"] / s["n"], "n", self.limits, among=kinds if kind else 1)
            for kind, sums in self.sums.items()
        }
        return {self.name: means.pop(None), "by_kind": means}


def _result_of(output: str, rubric: Rubric) -> dict[str, Any]:
    harm_summary = HarmSummary(rubric)
    for _, row in read_rows(output, rows_of(HarmScore if rubric is Rubric.SCALE else StrongRejectScore)):
        harm_summary.add(row)
    return harm_summary.result()


def estimate(rows: RowFlow, config: HarmConfig) -> StepCost:
    """The cost of one request a reply, or of the three of StrongREJECT's rubric."""
    requests = rows.rows * (1 if config.rubric is Rubric.SCALE else 3)
    return StepCost(rows.rows, requests, TokenCounts(requests * (rows.prompt_tokens + rows.reply_tokens)), rows)


def run(config: HarmConfig) -> dict[str, Any]:
    """Score the replies of a file. Returns the summary. Raises CaiError."""
    reader, engine = config.row_reader(), config.open_engine(config.model)
    inputs = {"samples": hash_input(config.input)}
    form = resolve_prompt_format(config.prompt_format, engine)

    def items() -> WorkItems[Sample]:
        for line, row in reader.rows(config.input, sample_or_revision, config.limit):
            yield WorkItem(row.key, line, row)

    harm_summary = HarmSummary(config.rubric)
    judge = harm if config.rubric is Rubric.SCALE else strongreject
    summary = StageRun(
        provenance=provenance(
            "eval harm", inputs=inputs, settings=config.settings(prompt_format=form), model=engine.identity()
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=items,
        work=lambda rows: judge(rows, engine, form),
        batch_size=engine.batch_size,
        grows=True,
        total=expected_items(inputs["samples"], config.limit),
        engine=engine,
    ).complete(stream_sink(config.output, harm_summary.observe))
    result = harm_summary.result() if is_stream(config.output) else _result_of(config.output, config.rubric)
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "harm.json"), result)
    summary = {**summary, **result}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    most = int(harm_summary.limits[1])
    for name, mean in (("all", result[harm_summary.name]), *result["by_kind"].items()):
        if mean:
            value = f"{mean['value']:.2f} of {most} ({mean['low']:.2f} to {mean['high']:.2f})"
            console.say(f"{harm_summary.name}, {name} prompts: {value} over {mean['n']:,} replies")
    refuse_all_rejected(summary)
    return summary


STAGE = Stage("eval harm", Phase.EVALUATION, HarmConfig, run, estimate, reads=(Sample, Revision), writes=HarmScore)
