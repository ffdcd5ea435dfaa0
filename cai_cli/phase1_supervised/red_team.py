"""`cai red-team`: generate prompts by few-shot prompting with given ones (paper section 3.2 and its appendix).

In the paper a pretrained model generated 140,335 of the 182,831 red-team prompts this way, and for RL 491,142 red-team
and 474,300 helpful prompts more (`--kind helpful`). Each attempt shows a few prompts drawn from INPUT, names a drawn
topic, and takes one line. Near-duplicates of a given prompt or of an earlier new prompt are rejected
(`near_duplicates`). Departures, for small models: the line begins with the first words of another given prompt
(`--start-words`), and the default temperature and nucleus are below the paper's temperature of 1.

Attempts are numbered, and everything drawn for one derives from (seed, number), so a run that was killed and resumed
ends with the same prompts. Attempts are made in batches until `--n` prompts are kept; the size of a batch depends on
`--n` alone.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.near_duplicates import NearDuplicates
from cai_cli.common.seeds import seed_for
from cai_cli.data.jsonl import Numbered, display_name, read_prompts, read_rows, rows_of, skip_unusable
from cai_cli.data.reply_ends import CUT_OFF
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

ATTEMPTS_PER_PROMPT = 20  # the run gives up after this many attempts for each of the `--n` prompts
MIN_WORDS = 4
BEYOND = "made after --n were kept"
SOURCE, NO_TOPIC = "cai red-team: ", "no topic"


class RedTeamConfig(OutputOptions, InputOptions, EngineOptions, SamplingOptions):
    """Generate new prompts by few-shot prompting with given ones.

    INPUT: prompts in any format that `cai sample` takes. Writes Prompt rows, whose `source` names the topic. Give
    parallel runs different seeds (--seed).
    """

    n: int = option(100, "Number of new prompts.", Option(flags=("--n", "-n")), ge=1)
    kind: Kind = option("red-team", "Kind of prompt to generate.")
    topics: str | None = option(
        None, "File with one topic per line, topics separated by commas, or `none`; by default the built-in topics."
    )
    num_examples: int = option(
        5, "Prompts of INPUT in each few-shot prompt; each attempt draws its own.", Option(aliases=("shown",)), ge=1
    )
    start_words: int = option(
        2, "Words at the start of a new prompt that are taken from another prompt of INPUT.", ge=0
    )
    similarity: float = option(
        0.6, "Jaccard similarity at or above which a new prompt is rejected as a near-duplicate.", ge=0.1, le=1.0
    )
    exclude: str | None = option(
        None,
        "File of more prompts whose near-duplicates are rejected, such as the output of an earlier run.",
        Option(Effect.HASHED, reads_file=True, aliases=("avoid",)),
    )
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 64)
    temperature: float = redefine(SamplingOptions, "temperature", 0.7)
    top_p: float = redefine(SamplingOptions, "top_p", 0.9)


@dataclass(frozen=True)
class Attempt:
    """One request for a new prompt.

    Attributes:
        id: Id of the prompt that it generates.
        number: Its number in the run, from 0.
        topic: The topic to write about, or None.
        examples: The few-shot prompts.
        start: The first words of the new prompt.
    """

    id: str
    number: int
    topic: str | None
    examples: tuple[str, ...]
    start: str


@dataclass
class PromptGenerator:
    """Draws attempts and accepts or rejects what they generate, in the order of their numbers.

    Attributes:
        given: The prompts that few-shot prompts are drawn from.
        topics: The topics to draw from; empty for none.
        kind: Kind of the new prompts.
        num_examples: Prompts in each few-shot prompt.
        start_words: Words of another given prompt that a new prompt begins with.
        target: Number of prompts to keep.
        seed: Random seed of the run.
        run: Identifies this run, so that two runs never generate the same ids.
        known: The given, excluded and kept prompts, to find near-duplicates.
        kept: Ids of the prompts kept so far.
    """

    given: Sequence[str]
    topics: Sequence[str]
    kind: Kind
    num_examples: int
    start_words: int
    target: int
    seed: int
    run: str
    known: NearDuplicates
    kept: set[str] = field(default_factory=set)

    @property
    def batch_size(self) -> int:
        """Attempts in one batch; at most a twentieth of the prompts is generated in excess."""
        return min(1024, max(16, self.target // 20))

    def attempt(self, number: int) -> Attempt:
        """The attempt with this number: its topic, few-shot prompts and first words."""
        rng = random.Random(seed_for(self.seed, "red-team", "shown", number))  # noqa: S311
        topic = rng.choice(self.topics) if self.topics else None
        *examples, other = rng.sample(self.given, min(self.num_examples + 1, len(self.given)))
        start = " ".join(other.split()[: self.start_words])
        return Attempt(content_hash([self.run, number]), number, topic, tuple(examples), start)

    def accept(self, attempt: Attempt, reply: Completion | RequestFailure) -> Prompt | Rejected:
        """The prompt that an attempt generated, kept from now on, or the prompt rejected with the reason."""
        text = reply.text if isinstance(reply, Completion) else ""
        if not (isinstance(reply, Completion) and reply.restarted):
            text = attempt.start + text
        text = text.strip().strip('"“”').strip()
        row = Prompt(id=attempt.id, prompt=[user(text)], kind=self.kind, source=f"{SOURCE}{attempt.topic or NO_TOPIC}")
        if reason := self._problem(reply, text):
            return reject(row.key, reason, row)
        self.keep(row)
        return row

    def keep(self, row: Prompt) -> None:
        """Count a prompt as kept, and reject its near-duplicates from now on."""
        self.known.add(f"an earlier new prompt: {row.id}", row.prompt[0].content)
        self.kept.add(row.id)

    def _problem(self, reply: Completion | RequestFailure, text: str) -> str | None:
        if isinstance(reply, RequestFailure):
            return reply.reason
        reason = None
        if len(self.kept) >= self.target:
            reason = BEYOND
        elif reply.finish_reason == CUT_OFF:
            reason = "cut at --max-new-tokens"
        elif len(text.split()) < max(MIN_WORDS, self.start_words + 1):
            reason = "too short"
        elif evasive_opening(text):
            reason = "an answer instead of a prompt"
        elif repeated := self.known.find(text):
            reason = f"near-duplicate of {repeated[0]} ({repeated[1]:.2f})"
        return reason

    def work_items(self, finished: Path) -> WorkItems[Attempt]:
        """Attempts, batch after batch, until enough prompts are kept.

        Args:
            finished: The unfinished output of an interrupted run. Its prompts count as kept, and its attempts are
                yielded again.
        """
        if finished.exists():
            for _, row in read_rows(str(finished), rows_of(Prompt)):
                self.keep(row)
        kept, batch = 0, list[str]()
        for number in count():
            if number % self.batch_size == 0:
                kept += sum(id in self.kept for id in batch)
                batch = []
                if kept >= self.target or number >= ATTEMPTS_PER_PROMPT * self.target:
                    return
            attempt = self.attempt(number)
            batch.append(attempt.id)
            yield WorkItem(attempt.id, number + 1, attempt)


def red_team(
    attempts: Sequence[Attempt], generator: PromptGenerator, engine: Engine, *, sampling: Sampling, form: PromptFormat
) -> Iterator[Prompt | Rejected]:
    """Generate one prompt per attempt (paper section 3.2 and its appendix).

    Args:
        attempts: The attempts, in the order of their numbers.
        generator: Accepts or rejects each prompt; it knows all earlier ones.
        engine: The model.
        sampling: How tokens are sampled.
        form: Whether prompts are written in the chat template or as raw text.

    Yields:
        A Prompt for each attempt, in order, or the prompt rejected: too short, cut off, an answer instead of a prompt,
        a near-duplicate, or beyond the requested number.
    """
    requests = []
    for attempt in attempts:
        request = invention_request(attempt.examples, attempt.topic, attempt.start, generator.kind, form)
        requests.append(
            GenerationRequest(
                request.text, seed_for(generator.seed, "red-team", attempt.number), request.prefill, request.stop
            )
        )
    for attempt, reply in zip(attempts, engine.generate(requests, sampling), strict=True):
        yield generator.accept(attempt, reply)


def openings(prompts: Iterable[Numbered[Prompt]]) -> dict[str, int]:
    """The first user turn of each prompt -> its line, each text once. Later turns cannot be understood alone."""
    lines: dict[str, int] = {}
    for line, prompt in prompts:
        lines.setdefault(next(m.content.strip() for m in prompt.prompt if m.role == "user"), line)
    return lines


def pick_topics(topics: str | None, kind: Kind) -> list[str]:
    """The topics that `--topics` names.

    Args:
        topics: A file with one topic per line, topics separated by commas, `none`, or None for the built-in topics.
        kind: Kind of the prompts, which the built-in topics depend on.

    Raises:
        UsageError: The file is not UTF-8, or there is no topic.
    """
    if topics is None:
        return list(TOPICS[kind])
    if topics == "none":
        return []
    try:
        named = Path(topics).read_text(encoding="utf-8").splitlines() if Path(topics).is_file() else topics.split(",")
    except UnicodeDecodeError:
        raise UsageError(f"--topics {topics}: not UTF-8", code="cannot-read") from None
    names = [topic.strip() for topic in named if topic.strip()]
    if not names:
        raise UsageError(f"--topics {topics!r} names no topic", hint="--topics none uses none", code="invalid-option")
    return list(dict.fromkeys(names))


class Topics(dict[str, dict[str, int]]):
    """Topic -> how many of its prompts were kept (`out`) and rejected (`rejected`)."""

    def add(self, row: Prompt | Rejected) -> None:
        """Count one row."""
        source = str(row.source if isinstance(row, Prompt) else orjson.loads(row.row)["source"])
        counts = self.setdefault(source.removeprefix(SOURCE), {"out": 0, "rejected": 0})
        counts["out" if isinstance(row, Prompt) else "rejected"] += 1

    @classmethod
    def of_file(cls, output: Path) -> "Topics":
        """The counts of a finished output and its rejected rows."""
        counts = cls()
        for _, row in read_rows(str(output), rows_of(Prompt)):
            counts.add(row)
        rejected = sidecar(output, "rejected.jsonl")
        for _, rejected_row in read_rows(str(rejected), rows_of(Rejected)) if rejected.exists() else ():
            counts.add(rejected_row)
        return counts


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
    given = openings(islice(read_prompts(config.input, on_invalid=skip_unusable), config.limit))
    excluded = openings(read_prompts(config.exclude, on_invalid=skip_unusable)) if config.exclude else {}
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
    generator = PromptGenerator(
        given=list(given),
        topics=topics,
        kind=config.kind,
        num_examples=config.num_examples,
        start_words=config.start_words,
        target=config.n,
        seed=config.seed,
        run=content_hash(resumed_provenance(config.output, made_by, config.overwrite)),
        known=_known_prompts(given, excluded, config.similarity),
    )
    by_topic = Topics()
    summary = StageRun(
        provenance=made_by,
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        items=lambda: generator.work_items(sidecar(Path(config.output), "partial")),
        work=lambda attempts: red_team(attempts, generator, engine, sampling=config.sampling(), form=form),
        batch_size=generator.batch_size,
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


def _known_prompts(given: Mapping[str, int], excluded: Mapping[str, int], similarity: float) -> NearDuplicates:
    """The prompts that must not be generated again, each with its line."""
    known = NearDuplicates(similarity)
    for text, line in given.items():
        known.add(f"a given prompt: line {line}", text)
    for text, line in excluded.items():
        known.add(f"a prompt of --exclude: line {line}", text)
    return known


def print_topics(summary: dict[str, Any], target: int) -> None:
    """Print how many prompts were kept by topic, and warn where there are fewer than `target`."""
    for topic, counts in sorted(summary["topics"].items(), key=lambda item: -item[1]["out"]):
        console.say(f"  {counts['out']:>6,} kept, {counts['rejected']:>6,} rejected  {topic}")
    if summary["out"] < target:
        console.warn(
            f"red-team: {summary['in']:,} attempts gave {summary['out']:,} of {target:,} prompts: the model repeats "
            "itself; use more prompts, more topics or a higher --temperature"
        )


STAGE = Stage("red-team", Phase.SUPERVISED, RedTeamConfig, run, estimate, reads=(Prompt,), writes=Prompt)
