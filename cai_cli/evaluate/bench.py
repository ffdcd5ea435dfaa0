"""Scores models on a published benchmark, before and after training (`cai eval bench`; not in the paper).

Every model replies to every prompt, and a judge applies the benchmark's rule (`benchmarks`). The pairs of RewardBench
are decided by a preference model, or by a judge in both orders. Departures: any model can be the judge, under questions
in our own words, where HarmBench, StrongREJECT and SORRY-Bench have trained or chosen one; scores of different judges
are not comparable. HarmBench's behaviors about copyright, which it judges by the texts themselves, are rejected.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.data.benchmark_schema import BenchmarkPair, BenchmarkReply
from cai_cli.data.foreign.published import PUBLISHED
from cai_cli.data.jsonl import read_values
from cai_cli.data.row_reader import RowReader
from cai_cli.data.row_types import parse_row
from cai_cli.data.schema import Pair, Prompt, Rejected, Sample, conversation_id, reject
from cai_cli.engines.base import RequestFailure
from cai_cli.engines.group import EngineGroup
from cai_cli.evaluate.bench_config import BenchConfig
from cai_cli.evaluate.benchmark_results import BenchmarkResults
from cai_cli.evaluate.benchmarks import BENCHMARKS, BenchmarkRow, JudgeReplies, parse_benchmark_row
from cai_cli.evaluate.judged_options import JUDGE
from cai_cli.judging.base import sigmoid
from cai_cli.judging.judge import Judge
from cai_cli.judging.votes import Labeller, aggregate_votes
from cai_cli.metrics.intervals import percent, with_interval
from cai_cli.metrics.label_audit import win_or_half
from cai_cli.models.names import public_name
from cai_cli.phase1_supervised.sample import sample
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format
from cai_cli.prompting.benchmarks import BETTER_REPLY
from cai_cli.reward.scorer import Scorer
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance, write_json
from cai_cli.runtime.output_files import is_stdout, is_stream, sidecar
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

Outcome = BenchmarkReply | BenchmarkPair | Rejected


@dataclass(frozen=True)
class BenchmarkItem:
    """One reply to sample and to judge, or one pair to decide."""

    model: str
    row: BenchmarkRow
    index: int = 0

    @property
    def key(self) -> str:
        """The key of the row that comes of it."""
        id = f"{self.row.id} {self.model}"
        return id if self.row.chosen else f"{id}/{self.index}"


Work = Callable[[str, Sequence[BenchmarkItem]], Iterator[Outcome]]  # of the items of one model


@dataclass(frozen=True)
class Bench:
    """How the items of a benchmark are worked on, and the parts of the provenance that describe it.

    Attributes:
        work: Gives one outcome for each item of one model, in order.
        batch_size: How many items to pass at once.
        provenance: The models and the judge.
        engine: The models' engines; None with preference models.
        release: Called with the name of a model that is not needed any more.
    """

    work: Work
    batch_size: int
    provenance: Mapping[str, Any]
    engine: EngineGroup | None = None
    release: Callable[[str], None] = field(default=lambda name: None)


def items(rows: Iterator[tuple[int, BenchmarkRow]], models: Sequence[str], n: int) -> WorkItems[BenchmarkItem]:
    """Yield every row `n` times for each model, one model after the other, so that one of them is loaded at a time."""
    kept: list[tuple[int, BenchmarkRow]] = []

    def first() -> Iterator[tuple[int, BenchmarkRow]]:
        for numbered in rows:
            kept.append(numbered)
            yield numbered

    for place, model in enumerate(models):
        for line, row in kept if place else first():
            hashed = row.id == conversation_id([*row.prompt, *row.chosen, *row.rejected])
            for index in range(n):
                item = BenchmarkItem(model, row, index)
                yield WorkItem(item.key, line, item, hashed_id=hashed)


# --- replies ------------------------------------------------------------------------------------------------------


def open_replies(config: BenchConfig, rule: JudgeReplies) -> Bench:
    """The sampling and judging of replies. Raises UsageError, CaiError."""
    group = config.open_group(config.models())
    forms = {name: resolve_prompt_format(config.prompt_format, engine) for name, engine in group.engines.items()}
    identities = {name: identity | {"prompt_format": forms[name]} for name, identity in group.identity().items()}
    return Bench(
        partial(judged_replies, config=config, group=group, forms=forms, rule=rule),
        group.largest_batch,
        {"judge": identities.pop(JUDGE), "models": identities},
        group,
        group.release,
    )


def judged_replies(
    model: str,
    requested: Sequence[BenchmarkItem],
    *,
    config: BenchConfig,
    group: EngineGroup,
    forms: Mapping[str, PromptFormat],
    rule: JudgeReplies,
) -> Iterator[Outcome]:
    """Yield a judged reply of one model to each prompt, in order."""
    prompts = [(item.row.as_prompt(), item.index) for item in requested]
    sampling = config.sampling()
    replies = list(sample(prompts, group[model], sampling=sampling, form=forms[model], seed=config.seed))
    judged = [reply for reply in replies if isinstance(reply, Sample)]
    verdicts = iter(rule(judged, group[JUDGE], forms[JUDGE]) if judged else ())
    for item, reply in zip(requested, replies, strict=True):
        if isinstance(reply, Rejected):
            yield reject(item.key, reply.reason, item.row.as_prompt())
            continue
        verdict = next(verdicts)
        if isinstance(verdict, RequestFailure):
            yield reject(item.key, f"not judged: {verdict.reason}", reply)
            continue
        yield BenchmarkReply(
            **reply.sample_fields() | {"id": f"{item.row.id} {model}"},
            prompt_id=item.row.id,
            benchmark=str(config.benchmark),
            model=model,
            groups=item.row.groups,
            value=verdict.value,
            answers=dict(verdict.answers),
        )


# --- pairs --------------------------------------------------------------------------------------------------------


def open_scorers(config: BenchConfig) -> Bench:
    """Preference models that decide pairs by the difference of two scores. Raises UsageError, CaiError."""
    scorers = {name: Scorer.of_evaluation(model, config) for name, model in config.models().items()}

    def release(name: str) -> None:
        with closing(scorers.pop(name)):
            pass

    def work(model: str, requested: Sequence[BenchmarkItem]) -> Iterator[Outcome]:
        sides = [side for item in requested for side in _conversations(item.row)]
        scored = list(scorers[model].score(sides))
        for place, item in enumerate(requested):
            chosen, rejected = scored[2 * place : 2 * place + 2]
            if isinstance(chosen, Rejected) or isinstance(rejected, Rejected):
                failed = chosen if isinstance(chosen, Rejected) else rejected
                yield reject(item.key, failed.reason if isinstance(failed, Rejected) else "", item.row)
            else:
                margin = chosen.score - rejected.score
                yield _decided(item, float(margin > 0), sigmoid(margin))

    size = 2 * max(scorer.batch_size for scorer in scorers.values())
    return Bench(
        work, size, {"models": {name: s.identity() | s.precision() for name, s in scorers.items()}}, release=release
    )


def open_pair_judges(config: BenchConfig) -> Bench:
    """Language models that decide pairs in both orders. Raises UsageError, CaiError."""
    group = config.open_group(config.models())
    forms = {name: resolve_prompt_format(config.prompt_format, engine) for name, engine in group.engines.items()}

    def work(model: str, requested: Sequence[BenchmarkItem]) -> Iterator[Outcome]:
        judge = Judge(group[model], "choice", (), forms[model], config.seed, config.sampling())
        labeller = Labeller(judge, [BETTER_REPLY], 1, ("ab", "ba"))
        for item, verdict in zip(requested, aggregate_votes([_pair(i.row) for i in requested], labeller), strict=True):
            if isinstance(verdict, RequestFailure):
                yield reject(item.key, verdict.reason, item.row)
            else:
                value = win_or_half(verdict.p_a)
                yield _decided(item, value, verdict.p_a, votes=verdict.as_rows("choice"))

    identities = {name: e.identity() | {"prompt_format": forms[name]} for name, e in group.engines.items()}
    return Bench(work, group.largest_batch, {"models": identities}, group, group.release)


def _conversations(row: BenchmarkRow) -> Iterator[Sample]:
    for index, completion in enumerate((row.chosen, row.rejected)):
        yield Sample(id=row.id, prompt=row.prompt, sample_index=index, completion=completion, finish_reason=None)


def _pair(row: BenchmarkRow) -> Pair:
    return Pair(id=row.id, prompt=row.prompt, a=row.chosen, b=row.rejected, human="a", source=row.source)


def _decided(item: BenchmarkItem, value: float, p_chosen: float, votes: Sequence[Any] = ()) -> BenchmarkPair:
    row = item.row
    return BenchmarkPair(
        id=item.key,
        prompt_id=row.id,
        benchmark="rewardbench",
        model=item.model,
        groups=row.groups,
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        value=value,
        p_chosen=p_chosen,
        votes=list(votes),
    )


# --- the command --------------------------------------------------------------------------------------------------


def estimate(rows: RowFlow, config: BenchConfig) -> StepCost:
    """The cost of one reply a model and prompt and its judgement, or of the judgement of each pair."""
    models = len(config.models())
    if config.benchmark == "rewardbench":
        pairs = rows.rows * models
        requests = pairs if config.pm else 2 * pairs
        after = RowFlow(pairs, 1, rows.prompt_tokens, rows.reply_tokens, texts=2)
        return StepCost(pairs, requests, TokenCounts(2 * pairs * (rows.prompt_tokens + rows.reply_tokens)), after)
    replies, new = rows.rows * models * config.n, config.max_new_tokens
    asked = replies * (3 if config.benchmark == "strongreject" else 1)
    tokens = TokenCounts(replies * rows.prompt_tokens + asked * (rows.prompt_tokens + new), replies * new)
    return StepCost(replies, replies + asked, tokens, RowFlow(replies, config.n, rows.prompt_tokens, new, texts=1))


def open_bench(config: BenchConfig) -> Bench:
    """What the options describe. Raises UsageError, CaiError."""
    rule = BENCHMARKS[config.benchmark].judge
    if rule is not None:
        return open_replies(config, rule)
    return open_scorers(config) if config.pm else open_pair_judges(config)


def run(config: BenchConfig) -> dict[str, Any]:
    """Score models on a benchmark. Returns the summary. Raises CaiError."""
    reader = RowReader(skip_invalid=config.skip_invalid, max_invalid=config.max_invalid)
    inputs, models = {"benchmark": hash_input(config.input)}, list(config.models())
    bench = open_bench(config)

    def rows() -> Iterator[tuple[int, BenchmarkRow]]:
        return reader.rows(
            config.input, lambda value: parse_benchmark_row(config.benchmark, value, reader.dropped), config.limit
        )

    results = BenchmarkResults(models, sections=config.benchmark == "rewardbench")
    summary = StageRun(
        provenance=provenance(
            "eval bench", inputs=inputs, settings=config.settings() | {"order": models}, **bench.provenance
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: items(rows(), models, config.n),
        work=ModelByModel(bench),
        batch_size=bench.batch_size,
        engine=bench.engine,
    ).complete(stream_sink(config.output, results.observe))
    if not is_stream(config.output):
        for _, value in read_values(config.output):
            results.observe(parse_row(value))
    result = _described(config, results)
    if not is_stream(config.output):
        write_json(sidecar(Path(config.output), "bench.json"), result)
    summary = {**summary, **result}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    print_result(result)
    refuse_all_rejected(summary)
    return summary


class ModelByModel:
    """The work on batches whose items come one model after the other; a model that is done with is released."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.current: str | None = None

    def __call__(self, batch: Sequence[BenchmarkItem]) -> Iterator[Outcome]:
        for model, of_model in groupby(batch, key=lambda item: item.model):
            if self.current not in (None, model):
                self.bench.release(str(self.current))
            self.current = model
            yield from self.bench.work(model, list(of_model))


def _described(config: BenchConfig, results: BenchmarkResults) -> dict[str, Any]:
    """The scores, with what they are scores of."""
    of = BENCHMARKS[config.benchmark]
    judge = public_name(config.judge) if config.judge else None
    named = {"benchmark": str(config.benchmark), "title": PUBLISHED[config.benchmark].title}
    return {**named, "metric": of.metric, "better": of.better, "judge": judge, **results.result()}


def print_result(result: Mapping[str, Any]) -> None:
    """Print the scores on stderr; a difference is called one only where its interval excludes zero."""
    for one in result["models"]:
        share = percent(one["score"])
        console.say(f"{result['title']}, {one['model']}: {result['metric']} {share} over {one['score']['n']:,}")
    if missing := result["without_scores"]:
        console.warn(f"{result['title']}: no reply of {', '.join(missing)} was scored, so nothing is compared with it")
    for difference in result["differences"]:
        low, high = difference["low"], difference["high"]
        change = "no significant difference" if low <= 0 <= high else _change(result["better"], low > 0)
        ends = with_interval(difference, "+.1%")
        console.say(f"{difference['model']} against {difference['baseline']}: {change}: {ends}")
    if result["better"] == "lower" and result["judge"]:
        console.say(f"judged by {result['judge']}: compare with scores of the same judge only")


def _change(better: str, rose: bool) -> str:
    return "better" if rose == (better == "higher") else "worse"


STAGE = Stage("eval bench", Phase.EVALUATION, BenchConfig, run, estimate, reads=(Prompt,), writes=BenchmarkReply)
