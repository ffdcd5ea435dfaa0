"""What critique, revise and critique-revise share: who answers, under which principles, and the run over a file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.draw import draw, select
from cai_cli.constitution.schema import CritiqueConstitution, CritiqueExample, CritiquePrinciple, open_constitution
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Critique, Message, Rejected, Revision, Sample
from cai_cli.engines import engine_of
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.format_checks import generate_checked
from cai_cli.prompting.base import PromptFormat, Request, resolve_prompt_format
from cai_cli.runtime.manifest import hash_input, provenance, settings_of
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems

Work = Callable[[Sequence[Any], "Reviser"], Iterable[Sample | Rejected]]


@dataclass(frozen=True)
class Reviser:
    """A model that criticises and revises its replies under principles."""

    engine: Engine
    principles: Sequence[CritiquePrinciple]
    examples: Sequence[CritiqueExample]
    form: PromptFormat
    sampling: Sampling
    seed: int

    def principle_for(self, row: Sample, round: int) -> CritiquePrinciple:
        """Drawn anew for every row and round; the draw depends on nothing else."""
        return draw(self.principles, self.seed, "principle", row.id, row.sample_index, round)

    def answers(
        self,
        stage: str,
        rows: Sequence[Sample],
        rounds: Sequence[int],
        requests: Sequence[Request],
        problem: Callable[[int, str], str | None],
    ) -> list[Completion | RequestFailure]:
        """One checked answer per request, each with noise from its own row and round."""
        asks = [
            GenerationRequest(
                r.text, seed_for(self.seed, stage, row.id, row.sample_index, round), r.prefill, r.stop, row.key
            )
            for row, round, r in zip(rows, rounds, requests, strict=True)
        ]
        return generate_checked(self.engine, asks, self.sampling, problem)


def conversation(row: Sample) -> list[Message]:
    """The prompt and the reply under critique."""
    return [*row.prompt, *row.completion]


def history_of(row: Sample) -> list[Any]:
    return list(row.history) if isinstance(row, Critique | Revision) else []


def run_revision_stage(stage: str, parse: Callable[[object], Sample], work: Work, flags: dict[str, Any]) -> None:
    """Wire one of the three commands, whose options are `flags`, to its files."""
    loaded = open_constitution(CritiqueConstitution, flags["constitution"], flags["few_shot"])
    principles = select(loaded.principles, flags["principles"], flags["max_principles"])
    engine = engine_of(flags)
    source, limit, reader = flags["input"], flags["limit"], RowReader.of(flags)
    inputs = {"samples": hash_input(source)}
    form = resolve_prompt_format(flags["prompt_format"], engine)
    reviser = Reviser(
        engine,
        principles,
        loaded.examples,
        form,
        Sampling(flags["max_new_tokens"], flags["temperature"], flags["top_p"]),
        flags["seed"],
    )

    def units() -> WorkItems[Sample]:
        for line, row in reader.rows(source, parse, limit):
            yield WorkItem(row.key, line, row)

    lines = inputs["samples"].lines
    StageRun(
        provenance=provenance(
            stage,
            inputs=inputs,
            settings=settings_of(flags, prompt_format=form),
            model=engine.identity(),
            constitution={"name": loaded.name, "fingerprint": loaded.fingerprint()},
        ),
        inputs=inputs,
        output=flags["output"],
        overwrite=flags["overwrite"],
        reader=reader,
        units=units,
        work=lambda rows: work(rows, reviser),
        window=engine.batch_size,
        engine=engine,
        total=None if lines is None else min(lines, limit or lines),
    ).run(as_json=flags["json"])
