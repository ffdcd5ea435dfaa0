"""Shared by critique, revise and critique-revise: the model with its principles, and the run over a file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.draw import draw, select
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import CritiqueConstitution, CritiqueExample, CritiquePrinciple, open_constitution
from cai_cli.data.schema import Critique, Message, Rejected, Revision, Sample
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.format_checks import generate_checked
from cai_cli.prompting.base import PromptFormat, Request, resolve_prompt_format
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import EngineOptions, OutputOptions, SamplingOptions, ShardOptions
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items

Work = Callable[[Sequence[Any], "Reviser"], Iterable[Sample | Rejected]]


@dataclass(frozen=True)
class Reviser:
    """A model that critiques and revises replies under principles.

    Attributes:
        engine: The model.
        principles: The principles to draw from.
        examples: Few-shot examples of critique and revision; empty for a zero-shot prompt.
        form: Whether prompts are written in the chat template or as raw text.
        sampling: How tokens are sampled.
        seed: Random seed of the run.
    """

    engine: Engine
    principles: Sequence[CritiquePrinciple]
    examples: Sequence[CritiqueExample]
    form: PromptFormat
    sampling: Sampling
    seed: int

    def principle_for(self, row: Sample, round: int) -> CritiquePrinciple:
        """The principle of a row's round. The draw depends on the seed, the row and the round alone."""
        return draw(self.principles, self.seed, "principle", row.id, row.sample_index, round)

    def answers(
        self,
        stage: str,
        rows: Sequence[Sample],
        rounds: Sequence[int],
        requests: Sequence[Request],
        problem: Callable[[int, str], str | None],
    ) -> list[Completion | RequestFailure]:
        """Generate one checked answer for each request, with a seed from its row and round.

        Args:
            stage: `critique` or `revise`, a part of the seed.
            rows: The row of each request.
            rounds: The round of each request, counted from 1.
            requests: The prompts.
            problem: Called with the index of a request and its answer; returns why the answer fails, or None.

        Returns:
            One answer for each request, in order; see `generate_checked`.
        """
        generation_requests = [
            GenerationRequest(
                r.text, seed_for(self.seed, stage, row.id, row.sample_index, round), r.prefill, r.stop, row.key
            )
            for row, round, r in zip(rows, rounds, requests, strict=True)
        ]
        return generate_checked(self.engine, generation_requests, self.sampling, problem)


def conversation(row: Sample) -> list[Message]:
    """The prompt and the reply of a row, as one conversation."""
    return [*row.prompt, *row.completion]


def history_of(row: Sample) -> list[Any]:
    """The earlier rounds of a row; none where it is a plain sample."""
    return list(row.history) if isinstance(row, Critique | Revision) else []


class ReviserConfig(OutputOptions, ShardOptions, EngineOptions, SamplingOptions, ConstitutionOptions):
    """The options of critique, revise and critique-revise."""


def run_revision_stage(
    stage: str, parse: Callable[[object], Sample], work: Work, config: ReviserConfig
) -> dict[str, Any]:
    """Run one of the three stages on its files.

    Args:
        stage: Name of the stage.
        parse: Parses a line of the input.
        work: The stage's function over a batch of rows.
        config: The options of the stage.

    Returns:
        The summary.

    Raises:
        CaiError: A file, the model or the constitution cannot be used, or the output belongs to another run.
    """
    loaded = open_constitution(CritiqueConstitution, config.constitution, config.few_shot)
    principles = select(loaded.principles, config.principles, config.max_principles)
    engine = config.open_engine(config.model)
    reader = config.row_reader()
    inputs = {"samples": hash_input(config.input)}
    form = resolve_prompt_format(config.prompt_format, engine)
    reviser = Reviser(engine, principles, loaded.examples, form, config.sampling(), config.seed)

    def items() -> WorkItems[Sample]:
        for line, row in reader.rows(config.input, parse, config.limit):
            yield WorkItem(row.key, line, row)

    return StageRun(
        provenance=provenance(
            stage,
            inputs=inputs,
            settings=config.settings(prompt_format=form),
            model=engine.identity(),
            constitution={"name": loaded.name, "fingerprint": loaded.fingerprint()},
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=items,
        work=lambda rows: work(rows, reviser),
        batch_size=engine.batch_size,
        grows=True,
        engine=engine,
        total=expected_items(inputs["samples"], config.limit),
    ).run(as_json=config.as_json)


def estimate_requests(rows: RowFlow, config: ReviserConfig, requests_per_row: int, rounds: int = 1) -> StepCost:
    """The cost of `requests_per_row` critiques and revisions of each row, each as long as allowed."""
    new, requests = config.max_new_tokens, rows.rows * requests_per_row
    examples = open_constitution(CritiqueConstitution, config.constitution, config.few_shot).examples
    few_shot = sum(len(example.model_dump_json()) for example in examples) / CHARACTERS_PER_TOKEN
    each = few_shot + rows.prompt_tokens + rows.reply_tokens + new
    after = RowFlow(rows.rows, rows.per_prompt, rows.prompt_tokens, new, rounds, rows.texts + requests_per_row)
    return StepCost(rows.rows, requests, TokenCounts(requests * each, requests * new), after)
