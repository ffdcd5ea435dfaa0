"""`cai sample`: prompts -> replies of a model (paper section 3.1, initial responses; section 4.1, pairs to compare).

The paper samples at T = 1 without nucleus; so do we by default. Every (prompt, sample_index) draws from its own seed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, get_args

import typer

from cai_cli.cli import options
from cai_cli.common.errors import UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.data.jsonl import Numbered
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Kind, Prompt, Rejected, Sample, conversation_id, reject
from cai_cli.engines import engine_of
from cai_cli.engines.base import Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.prompting.base import PromptFormat, assistant, reply_request, resolve_prompt_format
from cai_cli.runtime.manifest import hash_input, provenance, settings_of
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems

SampleUnit = tuple[Prompt, int]


def sample(
    units: Sequence[SampleUnit], engine: Engine, *, sampling: Sampling, form: PromptFormat, seed: int
) -> Iterator[Sample | Rejected]:
    """One reply per (prompt, sample_index), in order. An empty reply is rejected, as is a prompt that does not fit."""
    asks = [
        GenerationRequest(r.text, seed_for(seed, "sample", p.id, index), r.prefill, r.stop, f"{p.id}/{index}")
        for p, index in units
        for r in [reply_request(p.prompt, form)]
    ]
    for (prompt, index), reply in zip(units, engine.generate(asks, sampling), strict=True):
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
            )


def prompt_units(prompts: Iterable[Numbered[Prompt]], n: int) -> WorkItems[SampleUnit]:
    """Every prompt n times."""
    for line, prompt in prompts:
        hashed = prompt.id == conversation_id(prompt.prompt)
        for index in range(n):
            yield WorkItem(f"{prompt.id}/{index}", line, (prompt, index), hashed_id=hashed)


def pick_kind(kind: str | None) -> Kind | None:
    """`--kind` as a row holds it. Raises UsageError."""
    for known in get_args(Kind):
        if kind == known:
            return "red-team" if known == "red-team" else "helpful"
    if kind is not None:
        raise UsageError(f"--kind must be red-team or helpful, not {kind!r}")
    return None


def command(
    input: options.Input,
    output: options.Output = "-",
    model: options.Model = options.DEFAULT_MODEL,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Replies per prompt.")] = 1,
    kind: Annotated[str | None, typer.Option(help="red-team or helpful, for rows that do not say.")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    prompt_format: options.PromptFormatOption = "auto",
    seed: options.Seed = 0,
    limit: options.Limit = None,
    shard: options.Shard = None,
    skip_invalid: options.SkipInvalid = False,
    max_invalid: options.MaxInvalid = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    base_url: options.BaseUrl = None,
    concurrency: options.Concurrency = None,
    timeout: options.Timeout = None,
    budget_tokens: options.BudgetTokens = None,
    price_in: options.PriceIn = None,
    price_out: options.PriceOut = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Sample replies to prompts.

    INPUT: Prompt rows, {"prompt": ...}, {"messages": ...}, HH-RLHF rows, plain text (one prompt a line), parquet or
    hf://datasets/OWNER/NAME. Writes Sample rows.
    """
    flags = locals()
    default_kind = pick_kind(kind)
    reader = RowReader.of(flags)
    engine = engine_of(flags)
    inputs = {"prompts": hash_input(input)}
    form = resolve_prompt_format(prompt_format, engine)
    settings = settings_of(flags, prompt_format=form)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    lines = inputs["prompts"].lines
    StageRun(
        provenance=provenance("sample", inputs=inputs, settings=settings, model=engine.identity()),
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        reader=reader,
        units=lambda: prompt_units(reader.prompts(input, default_kind, limit), n),
        work=lambda units: sample(units, engine, sampling=sampling, form=form, seed=seed),
        window=engine.batch_size,
        engine=engine,
        total=None if lines is None else n * min(lines, limit or lines),
    ).run(as_json=json)
