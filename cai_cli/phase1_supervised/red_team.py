"""`cai red-team`: new prompts from a model that is shown some of the given ones (paper appendix on red-team prompts).

Of the paper's 182,831 red-team prompts 140,335 were made so, by a pretrained model with a few prompts before it; of
the helpful ones none (`--kind helpful` makes those likewise). An attempt shows a few prompts drawn from INPUT, names a
drawn topic, and takes one line. What nearly repeats a given prompt or an earlier new one is rejected
(`near_duplicates`). Departures, for small models: the line begins with the first words of yet another given prompt
(`--start-words`), and the defaults of temperature and nucleus are below the paper's T = 1.

Attempts are numbered, and everything drawn for one comes from (seed, number), so a run that was killed ends in the same
prompts. They are made in windows until `--n` prompts are kept; the window's size depends on `--n` alone.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.near_duplicates import NearDuplicates
from cai_cli.common.seeds import seed_for
from cai_cli.data.jsonl import Numbered, display_name, read_prompts, read_rows, rows_of
from cai_cli.data.schema import Kind, Prompt, Rejected, content_hash, reject
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.metrics.reply_habits import evasive_opening
from cai_cli.prompting.base import PromptFormat, resolve_prompt_format, user
from cai_cli.prompting.red_team import TOPICS, invention_request
from cai_cli.runtime.config import Effect, Option, option, redefine
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.output_files import is_stdout, is_stream, resumed_provenance, sidecar
from cai_cli.runtime.shared_options import EngineOptions, InputOptions, OutputOptions, SamplingOptions
from cai_cli.runtime.sinks import stream_sink
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

ATTEMPTS_A_PROMPT = 20  # after so many for each prompt that is wanted the model is taken to have no more
LEAST_WORDS = 4
BEYOND = "made after --n were kept"
SOURCE, NO_TOPIC = "cai red-team: ", "no topic"


class RedTeamConfig(OutputOptions, InputOptions, EngineOptions, SamplingOptions):
    """Generate new prompts by few-shot prompting with given ones.

    INPUT: prompts in any form that `cai sample` takes. Writes Prompt rows, whose `source` names the topic. Runs side by
    side each need a --seed of their own.
    """

    n: int = option(100, "Number of new prompts.", Option(flags=("--n", "-n")), ge=1)
    kind: Kind = option("red-team", "Kind of prompt to generate.")
    topics: str | None = option(
        None, "File with a topic a line, topics separated by commas, or none; by default the built-in topics."
    )
    num_examples: int = option(
        5, "Prompts of INPUT in each few-shot prompt, drawn again for each attempt.", Option(aliases=("shown",)), ge=1
    )
    start_words: int = option(2, "Number of words of another prompt of INPUT that a new prompt begins with.", ge=0)
    similarity: float = option(0.6, "Jaccard similarity from which a prompt is a near-duplicate.", ge=0.1, le=1.0)
    exclude: str | None = option(
        None,
        "File of further prompts that must not be generated again, such as the output of an earlier run.",
        Option(Effect.HASHED, reads_file=True, aliases=("avoid",)),
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 64)
    temperature: float = redefine(SamplingOptions, "temperature", 0.7)
    top_p: float = redefine(SamplingOptions, "top_p", 0.9)


@dataclass(frozen=True)
class Attempt:
    """What one attempt shows: `id` is that of the prompt it makes."""

    id: str
    number: int
    topic: str | None
    examples: tuple[str, ...]
    start: str


@dataclass
class PromptGenerator:
    """Draws attempts and judges what came of them, in the order of their numbers."""

    given: Sequence[str]
    topics: Sequence[str]
    kind: Kind
    num_examples: int
    start_words: int
    wanted: int
    seed: int
    run: str  # what identifies this run among others, so that no two make the same ids
    known: NearDuplicates
    kept: set[str] = field(default_factory=set)

    @property
    def window(self) -> int:
        """How many attempts are made at once: what is made too much is at most a twentieth."""
        return min(1024, max(16, self.wanted // 20))

    def attempt(self, number: int) -> Attempt:
        rng = random.Random(seed_for(self.seed, "red-team", "shown", number))  # noqa: S311
        topic = rng.choice(self.topics) if self.topics else None
        *examples, other = rng.sample(self.given, min(self.num_examples + 1, len(self.given)))
        start = " ".join(other.split()[: self.start_words])
        return Attempt(content_hash([self.run, number]), number, topic, tuple(examples), start)

    def judge(self, attempt: Attempt, reply: Completion | RequestFailure) -> Prompt | Rejected:
        """The prompt that an attempt made, or why it is none."""
        text = attempt.start + (reply.text if isinstance(reply, Completion) else "")
        text = text.strip().strip('"“”').strip()
        row = Prompt(id=attempt.id, prompt=[user(text)], kind=self.kind, source=f"{SOURCE}{attempt.topic or NO_TOPIC}")
        if reason := self._refused(reply, text):
            return reject(row.key, reason, row)
        self.keep(row)
        return row

    def keep(self, row: Prompt) -> None:
        self.known.add(f"an earlier new prompt: {row.id}", row.prompt[0].content)
        self.kept.add(row.id)

    def _refused(self, reply: Completion | RequestFailure, text: str) -> str | None:
        if isinstance(reply, RequestFailure):
            return reply.reason
        reason = None
        if len(self.kept) >= self.wanted:
            reason = BEYOND
        elif reply.finish_reason == "length":
            reason = "cut at --max-new-tokens"
        elif len(text.split()) < max(LEAST_WORDS, self.start_words + 1):
            reason = "too short"
        elif evasive_opening(text):
            reason = "an answer instead of a prompt"
        elif repeated := self.known.find(text):
            reason = f"near-duplicate of {repeated[0]} ({repeated[1]:.2f})"
        return reason

    def units(self, finished: Path) -> WorkItems[Attempt]:
        """Attempts, until before a window enough prompts are kept. Those of an earlier run, whose prompts stand in
        `finished`, come again."""
        if finished.exists():
            for _, row in read_rows(str(finished), rows_of(Prompt)):
                self.keep(row)
        kept, asked = 0, list[str]()
        for number in count():
            if number % self.window == 0:
                kept += sum(name in self.kept for name in asked)
                asked = []
                if kept >= self.wanted or number >= ATTEMPTS_A_PROMPT * self.wanted:
                    return
            attempt = self.attempt(number)
            asked.append(attempt.id)
            yield WorkItem(attempt.id, number + 1, attempt)


def red_team(
    attempts: Sequence[Attempt], maker: PromptGenerator, engine: Engine, *, sampling: Sampling, form: PromptFormat
) -> Iterator[Prompt | Rejected]:
    """One outcome per attempt, in order: each is compared with what those before it made."""
    asks = []
    for attempt in attempts:
        request = invention_request(attempt.examples, attempt.topic, attempt.start, maker.kind, form)
        asks.append(
            GenerationRequest(
                request.text, seed_for(maker.seed, "red-team", attempt.number), request.prefill, request.stop
            )
        )
    for attempt, reply in zip(attempts, engine.generate(asks, sampling), strict=True):
        yield maker.judge(attempt, reply)


def openings(prompts: Iterable[Numbered[Prompt]]) -> dict[str, int]:
    """The first user turn of each prompt -> its line, each text once: later turns cannot stand alone."""
    found: dict[str, int] = {}
    for line, prompt in prompts:
        found.setdefault(next(m.content.strip() for m in prompt.prompt if m.role == "user"), line)
    return found


def pick_topics(topics: str | None, kind: Kind) -> list[str]:
    """`--topics`: a file with one a line, a list, `none`, or by default ours. Raises UsageError."""
    if topics is None:
        return list(TOPICS[kind])
    if topics == "none":
        return []
    try:
        named = Path(topics).read_text(encoding="utf-8").splitlines() if Path(topics).is_file() else topics.split(",")
    except UnicodeDecodeError:
        raise UsageError(f"--topics {topics}: not UTF-8") from None
    found = [topic.strip() for topic in named if topic.strip()]
    if not found:
        raise UsageError(f"--topics {topics!r} names no topic", hint="none draws no topics")
    return list(dict.fromkeys(found))


class Topics(dict[str, dict[str, int]]):
    """Topic -> {"out", "rejected"}."""

    def add(self, row: Prompt | Rejected) -> None:
        source = str(row.source if isinstance(row, Prompt) else orjson.loads(row.row)["source"])
        counts = self.setdefault(source.removeprefix(SOURCE), {"out": 0, "rejected": 0})
        counts["out" if isinstance(row, Prompt) else "rejected"] += 1

    @classmethod
    def of_file(cls, output: Path) -> "Topics":
        found = cls()
        for _, row in read_rows(str(output), rows_of(Prompt)):
            found.add(row)
        rejected = sidecar(output, "rejected.jsonl")
        for _, lost in read_rows(str(rejected), rows_of(Rejected)) if rejected.exists() else ():
            found.add(lost)
        return found


def estimate(rows: RowFlow, config: RedTeamConfig) -> StepCost:
    """The cost of generating `--n` prompts, as if no attempt were rejected."""
    new = config.max_new_tokens
    few_shot = (config.num_examples + 1) * rows.prompt_tokens
    tokens = TokenCounts(config.n * few_shot, config.n * new)
    return StepCost(config.n, config.n, tokens, RowFlow(config.n, 1, new, 0.0))


def run(config: RedTeamConfig) -> dict[str, Any]:
    """Generate prompts from a file of prompts. Returns the summary. Raises CaiError."""
    engine = config.open_engine(config.model)
    inputs = {"prompts": hash_input(config.input)}
    if config.exclude:
        inputs["exclude"] = hash_input(config.exclude)
    given = openings(islice(read_prompts(config.input), config.limit))
    excluded = openings(read_prompts(config.exclude)) if config.exclude else {}
    if len(given) < 2:
        raise CaiError(f"{display_name(config.input)} has fewer than two prompts", code="no-rows")
    topics, form = pick_topics(config.topics, config.kind), resolve_prompt_format(config.prompt_format, engine)
    made_by = provenance(
        "red-team",
        inputs=inputs,
        settings=config.settings(topics=topics, prompt_format=form),
        model=engine.identity(),
        given=content_hash([list(given), list(excluded)]),
    )
    known = NearDuplicates(config.similarity)
    for text, line in given.items():
        known.add(f"a given prompt: line {line}", text)
    for text, line in excluded.items():
        known.add(f"a prompt of --exclude: line {line}", text)
    generator = PromptGenerator(
        given=list(given),
        topics=topics,
        kind=config.kind,
        num_examples=config.num_examples,
        start_words=config.start_words,
        wanted=config.n,
        seed=config.seed,
        run=content_hash(resumed_provenance(config.output, made_by, config.overwrite)),
        known=known,
    )
    by_topic = Topics()
    summary = StageRun(
        provenance=made_by,
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        items=lambda: generator.units(sidecar(Path(config.output), "partial")),
        work=lambda attempts: red_team(attempts, generator, engine, sampling=config.sampling(), form=form),
        batch_size=generator.window,
        engine=engine,
        one_by_one=True,
    ).complete(stream_sink(config.output, by_topic.add))
    if not is_stream(config.output):
        by_topic = Topics.of_file(Path(config.output))
    summary = {**summary, "topics": by_topic}
    print_summary(summary, as_json=config.as_json, stdout_is_data=is_stdout(config.output))
    print_topics(summary, config.n)
    refuse_all_rejected(summary)
    return summary


def print_topics(summary: dict[str, Any], wanted: int) -> None:
    """Print how many prompts were kept by topic, and warn where there are fewer than wanted."""
    for topic, counts in sorted(summary["topics"].items(), key=lambda item: -item[1]["out"]):
        console.say(f"  {counts['out']:>6,} kept, {counts['rejected']:>6,} rejected  {topic}")
    if summary["out"] < wanted:
        console.warn(
            f"red-team: {summary['in']:,} attempts gave {summary['out']:,} of {wanted:,} prompts: the model repeats "
            "itself; give it more prompts, more topics or a higher --temperature"
        )


STAGE = Stage("red-team", Phase.SUPERVISED, RedTeamConfig, run, estimate, reads=(Prompt,), writes=Prompt)
