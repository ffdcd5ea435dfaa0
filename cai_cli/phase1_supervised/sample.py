"""`cai sample`: sample replies to prompts (paper section 3.1: initial responses; section 4.1: pairs to compare).

The defaults are those of the paper, temperature 1 without nucleus sampling. Every (prompt, sample_index) has its own
seed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cai_cli.common.seeds import seed_for
from cai_cli.data.jsonl import Numbered
from cai_cli.data.schema import Kind, Prompt, Rejected, Sample, conversation_id, reject
from cai_cli.engines.base import Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format
from cai_cli.prompting.system import SystemOptions, with_system
from cai_cli.runtime.config import Option, option
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import EngineOptions, OutputOptions, SamplingOptions, ShardOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items

SampleRequest = tuple[Prompt, int]  # a prompt and the index of the reply to sample


class SampleConfig(OutputOptions, ShardOptions, EngineOptions, SystemOptions, SamplingOptions):
    """Sample replies to prompts.

    INPUT: Prompt rows, conversations and pairs in any format that `cai convert` reads, of which the last turn of the
    assistant is left out, or plain text (one prompt a line). Writes Sample rows. A system prompt (--system) becomes the
    first turn of each row's prompt.
    """

    n: int = option(1, "Replies to each prompt.", Option(flags=("--n", "-n")), ge=1)
    kind: Kind | None = option(None, "Kind of the prompts that have no `kind`.")


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
                **dict(prompt),
                sample_index=index,
                completion=[assistant(reply.text.strip())],
                finish_reason=reply.finish_reason,
                thoughts=reply.thoughts,
            )


def prompt_items(prompts: Iterable[Numbered[Prompt]], n: int, system: str | None = None) -> WorkItems[SampleRequest]:
    """Each prompt `n` times, with sample indices from 0.

    Args:
        prompts: The prompts.
        n: How many replies to each.
        system: A system prompt for all. A prompt keeps its id, so that replies with and without it can be compared.
    """
    for line, prompt in prompts:
        hashed = prompt.id == conversation_id(prompt.prompt)
        opened = prompt if system is None else prompt.model_copy(update={"prompt": with_system(prompt.prompt, system)})
        for index in range(n):
            yield WorkItem(f"{prompt.id}/{index}", line, (opened, index), hashed_id=hashed)


def estimate(rows: RowFlow, config: SampleConfig) -> StepCost:
    """The cost of sampling, every reply as long as allowed."""
    replies, new = rows.rows * config.n, config.max_new_tokens
    after = RowFlow(replies, config.n, rows.prompt_tokens, new, texts=1)
    return StepCost(replies, replies, TokenCounts(replies * rows.prompt_tokens, replies * new), after)


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample from a file of prompts. Returns the summary. Raises CaiError."""
    reader = config.row_reader()
    engine = config.open_engine(config.model)
    inputs = {"prompts": hash_input(config.input)}
    form = resolve_prompt_format(config.prompt_format, engine)
    system = config.system_prompt()
    return StageRun(
        provenance=provenance(
            "sample",
            inputs=inputs,
            settings=config.settings(prompt_format=form, system=system),
            model=engine.identity(),
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: prompt_items(reader.prompts(config.input, config.kind, config.limit), config.n, system),
        work=lambda requested: sample(requested, engine, sampling=config.sampling(), form=form, seed=config.seed),
        batch_size=engine.batch_size,
        grows=True,
        engine=engine,
        total=expected_items(inputs["prompts"], config.limit, config.n),
    ).run(as_json=config.as_json)


STAGE = Stage("sample", Phase.SUPERVISED, SampleConfig, run, estimate, reads=(Prompt,), writes=Sample)
