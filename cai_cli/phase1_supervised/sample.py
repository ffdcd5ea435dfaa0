"""`cai sample`: sample replies to prompts (paper section 3.1: initial responses; section 4.1: pairs to compare).

The defaults are those of the paper, temperature 1 without nucleus sampling. Every (prompt, sample_index) has its own
seed.

`--contrast` samples as a character that follows a drawn principle, or breaks it; `cai pairs` makes labelled pairs of
both (RLCD, Yang et al. 2023, arXiv 2307.12950). Departure: the paper does not have it. RLCD puts its prompts around the
turns; here they are system prompts, written per principle in the YAML file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from cai_cli.common.errors import UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.constitution.draw import draw, select
from cai_cli.constitution.options import ConstitutionOptions
from cai_cli.constitution.schema import PreferenceConstitution, PreferencePrinciple, open_constitution
from cai_cli.data.jsonl import Numbered
from cai_cli.data.schema import ContrastSample, Kind, Prompt, Rejected, Sample, conversation_id, reject
from cai_cli.engines.base import Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format
from cai_cli.prompting.comparison import characters
from cai_cli.prompting.system import SystemOptions, own_system, with_system
from cai_cli.runtime.config import Group, Option, StageConfig, option, redefine
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import EngineOptions, OutputOptions, SamplingOptions, ShardOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items

SampleRequest = tuple[Prompt, int]  # a prompt and the index of the reply to sample


class Side(StrEnum):
    """Whether a character follows its principle or breaks it."""

    FOLLOWING = "following"
    BREAKING = "breaking"


@dataclass(frozen=True)
class Contrast:
    """Characters that follow or break principles.

    Attributes:
        side: Whether they follow or break them.
        principles: The principles to draw from.
        seed: Random seed of the run. The draw does not depend on the side.
    """

    side: Literal["following", "breaking"]
    principles: Sequence[PreferencePrinciple]
    seed: int

    def principle(self, prompt: str, index: int) -> PreferencePrinciple:
        """The principle of one reply to the prompt with this id."""
        return draw(self.principles, self.seed, "contrast", prompt, index)

    def system(self, prompt: str, index: int) -> str:
        """The system prompt of one reply."""
        following, breaking = characters(self.principle(prompt, index))
        return following if self.side == "following" else breaking

    def marked(self, row: Sample | Rejected) -> Sample | Rejected:
        """A reply with its side and its principle."""
        if isinstance(row, Rejected):
            return row
        drawn = self.principle(row.id, row.sample_index)
        own = own_system(row.prompt, self.system(row.id, row.sample_index))
        return ContrastSample(**row.sample_fields(), principle_id=drawn.id, contrast=self.side, own_system=own)


class ContrastOptions(StageConfig):
    """Replies that follow or break a principle."""

    contrast: Side | None = option(
        None,
        "Reply as a character that follows a drawn principle, or as one that breaks it (the `following` and `breaking` "
        "of the YAML file); `cai pairs` makes preferences of both.",
        Option(group=Group.PRINCIPLES),
    )
    constitution: str | None = redefine(
        ConstitutionOptions, "constitution", None, "YAML file of principles for --contrast; by default the shipped one."
    )
    principles: str | None = redefine(ConstitutionOptions, "principles", None)


class SampleConfig(OutputOptions, ShardOptions, EngineOptions, ContrastOptions, SystemOptions, SamplingOptions):
    """Sample replies to prompts.

    INPUT: Prompt rows, conversations and pairs in any format that `cai convert` reads, of which the last turn of the
    assistant is left out, or plain text (one prompt a line). Writes Sample rows. A system prompt (--system, --contrast)
    becomes the first turn of each row's prompt.
    """

    n: int = option(1, "Replies to each prompt.", Option(flags=("--n", "-n")), ge=1)
    kind: Kind | None = option(None, "Kind of the prompts that have no `kind`.")

    def check(self) -> None:
        super().check()
        if self.contrast is None and (self.constitution is not None or self.principles is not None):
            raise UsageError("--constitution and --principles need --contrast", code="option-conflict")
        if self.contrast is not None and (self.system is not None or self.system_from is not None):
            raise UsageError("--contrast has its own system prompts, so it excludes --system", code="option-conflict")

    def open_contrast(self) -> tuple[Contrast | None, dict[str, Any]]:
        """The characters of --contrast, if any, and the part of the provenance that describes them. Raises CaiError."""
        if self.contrast is None:
            return None, {}
        loaded = open_constitution(PreferenceConstitution, self.constitution, None)
        contrast = Contrast(self.contrast.value, select(loaded.principles, self.principles, None), self.seed)
        return contrast, {"constitution": {"name": loaded.name, "fingerprint": loaded.fingerprint()}}


def sample(
    requested: Sequence[SampleRequest], engine: Engine, *, sampling: Sampling, form: PromptFormat, seed: int
) -> Iterator[Sample | Rejected]:
    """Sample one reply for each (prompt, sample_index).

    Args:
        requested: Prompts, each with the index of the reply to sample.
        engine: The model.
        sampling: How tokens are sampled.
        form: Whether prompts are written in the chat template or as raw text.
        seed: Random seed of the run; a reply's own seed derives from it, the prompt's id and the index.

    Yields:
        A Sample for each requested reply, in order. A prompt is rejected if the reply is empty or the engine could not
        answer, for example because the prompt does not fit the context window.
    """
    requests = [
        GenerationRequest(r.text, seed_for(seed, "sample", p.id, index), r.prefill, r.stop, f"{p.id}/{index}")
        for p, index in requested
        for r in [reply_request(p.prompt, form)]
    ]
    for (prompt, index), reply in zip(requested, engine.generate(requests, sampling), strict=True):
        key = f"{prompt.id}/{index}"
        if isinstance(reply, RequestFailure):
            yield reject(key, reply.reason, prompt)
        elif not reply.text.strip():
            yield reject(key, "empty reply", prompt)
        else:
            yield Sample(
                **prompt.prompt_fields(),
                sample_index=index,
                completion=[assistant(reply.text.strip())],
                finish_reason=reply.finish_reason,
                thoughts=reply.thoughts,
            )


def prompt_items(
    prompts: Iterable[Numbered[Prompt]], n: int, system: str | None = None, contrast: Contrast | None = None
) -> WorkItems[SampleRequest]:
    """Each prompt `n` times, with sample indices from 0.

    Args:
        prompts: The prompts.
        n: How many replies to each.
        system: A system prompt for all. A prompt keeps its id, so that replies with and without it can be compared.
        contrast: Characters whose system prompts differ from reply to reply.
    """
    for line, prompt in prompts:
        hashed = prompt.id == conversation_id(prompt.prompt)
        for index in range(n):
            opening = contrast.system(prompt.id, index) if contrast else system
            opened = prompt
            if opening is not None:
                opened = prompt.model_copy(update={"prompt": with_system(prompt.prompt, opening)})
            yield WorkItem(f"{prompt.id}/{index}", line, (opened, index), hashed_id=hashed)


def estimate(rows: RowFlow, config: SampleConfig) -> StepCost:
    """The cost of sampling, every reply as long as allowed. A character of --contrast counts with the mean length."""
    replies, new = rows.rows * config.n, config.max_new_tokens
    after = RowFlow(replies, config.n, rows.prompt_tokens, new, texts=1)
    read = rows.prompt_tokens + _system_tokens(config)
    return StepCost(replies, replies, TokenCounts(replies * read, replies * new), after)


def _system_tokens(config: SampleConfig) -> float:
    """Tokens of the system prompt that is added to a conversation."""
    contrast, _ = config.open_contrast()
    sides = [characters(one)[contrast.side != "following"] for one in contrast.principles] if contrast else []
    texts = sides or [config.system_prompt() or ""]
    return sum(map(len, texts)) / len(texts) / CHARACTERS_PER_TOKEN


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample from a file of prompts. Returns the summary. Raises CaiError."""
    reader = config.row_reader()
    engine = config.open_engine(config.model)
    inputs = {"prompts": hash_input(config.input)}
    form = resolve_prompt_format(config.prompt_format, engine)
    system = config.system_prompt()
    contrast, constitution = config.open_contrast()

    def work(requested: Sequence[SampleRequest]) -> Iterator[Sample | Rejected]:
        replies = sample(requested, engine, sampling=config.sampling(), form=form, seed=config.seed)
        return map(contrast.marked, replies) if contrast else replies

    return StageRun(
        provenance=provenance(
            "sample",
            inputs=inputs,
            settings=config.settings(prompt_format=form, system=system),
            model=engine.identity(),
            **constitution,
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: prompt_items(reader.prompts(config.input, config.kind, config.limit), config.n, system, contrast),
        work=work,
        batch_size=engine.batch_size,
        grows=True,
        engine=engine,
        total=expected_items(inputs["prompts"], config.limit, config.n),
    ).run(as_json=config.as_json)


STAGE = Stage("sample", Phase.SUPERVISED, SampleConfig, run, estimate, reads=(Prompt,), writes=Sample)
