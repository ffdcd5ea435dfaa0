"""`cai run --dry-run`: the rows, tokens, GPU-hours and memory of every step, before anything runs.

New tokens are an upper bound, because every reply counts as long as allowed. Prompt tokens are estimated at four
characters per token. No row is assumed to be rejected. `paper_run` estimates the paper's own run in the same way, from
its numbers of prompts and assumed lengths.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import RowError
from cai_cli.data.formats import conversations, parse_prompt, scorable
from cai_cli.data.jsonl import origin, read_rows, skip_unusable
from cai_cli.data.schema import Revision
from cai_cli.data.sources import Columns
from cai_cli.data.transcripts import render_transcript
from cai_cli.phase1_supervised.sft import Revisions, SftConfig
from cai_cli.pipeline.memory_estimate import memory_of
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.sweep import split_name
from cai_cli.runtime import cost
from cai_cli.runtime.cost import CHARACTERS_PER_TOKEN, RowFlow, TokenCounts, joined
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.training.activations import ModelShape
from cai_cli.training.memory_check import Setting
from cai_cli.training.options import TrainerOptions


@dataclass(frozen=True)
class StepEstimate:
    """The cost of one step.

    Attributes:
        step: Its name.
        rows: Rows that it processes.
        requests: Requests to a model.
        tokens: Tokens that it reads, writes and trains on.
        bytes: Size of the file that it writes; 0 where it writes a model.
        command: Its command line.
        learning_rate: The learning rate that it trains with; None where it trains nothing.
        alone: Those of its tokens that one process handles while the others wait.
        memory: What training holds on each device; None where it trains nothing or its models are not on this machine.
        may_end: Why the rounds may end after this step; None where they do not.
    """

    step: str
    rows: int
    requests: int
    tokens: TokenCounts
    bytes: float
    command: str
    learning_rate: float | None
    alone: TokenCounts
    memory: Setting | None = None
    may_end: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The estimate as `--json` prints it."""
        return {
            "step": self.step,
            "rows": self.rows,
            "requests": self.requests,
            "prompt_tokens": round(self.tokens.prompt_tokens),
            "new_tokens": round(self.tokens.new_tokens),
            "trained_tokens": round(self.tokens.trained_tokens),
            "gpu_hours": {name: self.tokens.gpu_hours(size) for name, size in cost.MODELS.items()},
            "bytes": round(self.bytes),
            "command": self.command,
            "learning_rate": self.learning_rate,
            "memory": self.memory and self.memory.as_json(),
            "may_end": self.may_end,
        }


def estimate(steps: Sequence[Step]) -> list[StepEstimate]:
    """One estimate for each step, in order, with the memory of those that train."""
    shapes: dict[str, ModelShape] = {}  # of the models that steps train
    estimates = []
    for step, rows, step_estimate in estimate_rows(steps):
        if step.stage.trains and (setting := memory_of(step.config, rows, shapes)):
            shapes[str(step.output)] = setting.shape
            estimates.append(replace(step_estimate, memory=setting))
        else:
            estimates.append(step_estimate)
    return estimates


def estimate_rows(steps: Sequence[Step]) -> Iterator[tuple[Step, RowFlow, StepEstimate]]:
    """Each step in order, with the rows that it reads and its estimate without memory."""
    flows: dict[str, RowFlow] = {}
    for step in steps:
        rows = _rows_of(step, flows)
        step_estimate, after = estimate_step(step.name, step.stage, rows, step.config, step.shell)
        if not step.stage.trains:
            flows[str(step.output)] = after
        yield step, rows, step_estimate


def _rows_of(step: Step, flows: Mapping[str, RowFlow]) -> RowFlow:
    """The rows that a step reads, with those of all its files.

    Args:
        step: The step.
        flows: The rows that earlier steps write, by their files.
    """
    config = step.config
    skip_invalid = bool(step.settings.get("skip-invalid"))

    def read(source: str, columns: Columns | None = None) -> RowFlow:
        file = _file(source, flows)
        return flows.get(file) or _flow_of_file(file, skip_invalid, columns)

    def of_option(name: str) -> list[RowFlow]:
        given = getattr(config, name, None) or []
        return [read(file) for file in ([given] if isinstance(given, str) else given)]

    sources = config.input if isinstance(config.input, list) else [config.input]
    if not config.options()["input"][1].reads_file:  # models, which are asked what the stage knows
        sources = []
    columns = config.columns() if hasattr(config, "columns") else None
    read_rows = (read(source, columns) for source in sources)
    rows = min(read_rows, key=lambda one: one.rows, default=RowFlow(0, 1, 0.0, 0.0))  # several are joined by prompt
    if config.limit:
        rows = replace(rows, rows=min(rows.rows, config.limit))
    rows = joined([rows, *of_option("also")])
    if isinstance(config, SftConfig) and config.revisions is Revisions.ALL:
        rows = replace(rows, rows=rows.rows * max(1, rows.rounds), rounds=0)  # examples, as helpful replies are
    for option, ratio in (("mix", "mix_ratio"), ("helpful", "helpful_ratio")):
        if more := of_option(option) + of_option(f"also_{option}"):
            others = joined(more)
            count = min(others.rows, round(getattr(config, ratio) * rows.rows))
            rows = joined([rows, replace(others, rows=count)])
    return rows


def estimate_step(name: str, stage: Stage, rows: RowFlow, config: Any, shell: str) -> tuple[StepEstimate, RowFlow]:
    """The cost of one step, and the rows that it writes.

    Args:
        name: Name of the step.
        stage: The stage that it runs.
        rows: The rows that it reads.
        config: The options of the stage.
        shell: Its command line.
    """
    step_cost = stage.estimate(rows, config)
    size = 0.0 if stage.trains or stage.phase is Phase.EVALUATION else step_cost.output.bytes
    rate = config.peak_learning_rate if isinstance(config, TrainerOptions) else None
    whole = StepEstimate(name, step_cost.rows, step_cost.requests, step_cost.tokens, size, shell, rate, step_cost.alone)
    return whole, step_cost.output


def _file(source: str, flows: Mapping[str, RowFlow]) -> str:
    """The file that FILE or NAME=FILE names."""
    return source if source in flows or Path(source).exists() else split_name(source)[1]


def _flow_of_file(source: str, skip_invalid: bool, columns: Columns | None) -> RowFlow:
    on_invalid = (lambda _error, _raw: None) if skip_invalid else skip_unusable
    name = origin(source)
    measured = read_rows(source, lambda value: _row_flow(value, name), on_invalid, columns=columns, text=True)
    prompts: set[str] = set()
    rows: list[RowFlow] = []
    for _, (prompt, flow) in measured:
        prompts.add(prompt)
        rows.append(flow)
    if not rows:
        return RowFlow(0, 1, 0.0, 0.0)
    most = max(rows, key=lambda flow: flow.rounds)
    per_prompt = len(rows) // len(prompts) if most.texts else 1
    return replace(joined(rows), per_prompt=per_prompt, rounds=most.rounds, texts=most.texts)


def _row_flow(value: object, source: str) -> tuple[str, RowFlow]:
    """A row of any format: its prompt's id, and the row as a flow of one. Raises RowError."""
    prompt = parse_prompt(value, source=source)
    length = len(render_transcript(prompt.prompt)) / CHARACTERS_PER_TOKEN
    try:
        row = scorable(value, source)
    except RowError:  # a prompt alone
        return prompt.id, RowFlow(1, 1, length, 0.0)
    replies = [each.reply for each in conversations(row)]
    rounds = len(row.history) if isinstance(row, Revision) else 0
    reply = sum(map(len, replies)) / len(replies) / CHARACTERS_PER_TOKEN
    texts = 0 if len(replies) > 1 else 1 + 2 * rounds  # pairs are not to be paired again
    return prompt.id, RowFlow(1, 1, length, reply, rounds, texts)


def print_estimate(steps: Sequence[Step], *, as_json: bool, may_end: Mapping[str, str]) -> None:
    """Print the estimates on stdout: for each step a line of numbers and its command, or one JSON array.

    Args:
        steps: The steps of the run, with those of all rounds.
        as_json: Whether to print JSON.
        may_end: Step after which rounds may end early -> why.

    Raises:
        CaiError: A step does not fit the memory of its device (`not-enough-memory`).
    """
    estimates = [replace(e, may_end=may_end.get(e.step)) for e in estimate(steps)]
    if as_json:
        print(orjson.dumps([e.as_json() for e in estimates]).decode())
        _refuse_impossible(estimates)
        return
    name_width = max(14, *(len(e.step) + 1 for e in estimates))

    def line(name: str, rows: str, requests: str, tokens: TokenCounts) -> str:
        hours = "".join(f"{format_hours(tokens.gpu_hours(size)):>10}" for size in cost.MODELS.values())
        counts = f"{tokens.prompt_tokens:>15,.0f}{tokens.new_tokens:>13,.0f}{tokens.trained_tokens:>13,.0f}"
        return f"{name:<{name_width}}{rows:>10}{requests:>10}{counts}{hours}"

    sizes = "".join(f"{f'GPU-h {name}':>10}" for name in cost.MODELS)
    print(f"{'step':<{name_width}}{'rows':>10}{'requests':>10}{'prompt tokens':>15}{'new':>13}{'trained':>13}{sizes}")
    for e in estimates:
        print(line(e.step, f"{e.rows:,}", f"{e.requests:,}", e.tokens))
        print(console.safe(f"  $ {e.command}"))
        if e.learning_rate is not None:
            print(f"  # learning rate {e.learning_rate:g}")
        if e.memory is not None:
            print(f"  # memory {e.memory.arithmetic}")
        if e.may_end:
            print(f"  # may end here: {e.may_end}")
    print(line("total", "", f"{sum(e.requests for e in estimates):,}", cost.total([e.tokens for e in estimates])))
    print(f"GPU-h: {cost.ASSUMPTIONS}.")
    _refuse_impossible(estimates)


def _refuse_impossible(estimates: Sequence[StepEstimate]) -> None:
    for e in estimates:
        if e.memory is not None:
            e.memory.refuse_impossible(f"step {e.step!r}")


def format_hours(hours: float) -> str:
    """GPU-hours with two significant digits, or whole hours from ten on."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
