"""`cai run --dry-run --size 8B`: what each step of a run needs where every model in it has this size.

Memory and hours are those of 1 and of 8 H100s. No model has to be on this machine. On several GPUs a data step has one
copy of its models on each, or divides them among all where one GPU cannot hold them. A training step that sets no
`accelerate-config` has its rows divided among the GPUs (multi_gpu); where it trains all weights, these are sharded too
(fsdp2). Work that one process does while the others wait, such as the checks of `rl`, takes as long on 8 GPUs as on 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_cli.pipeline.estimate import StepEstimate, estimate_rows, format_hours
from cai_cli.pipeline.memory_estimate import setting_of
from cai_cli.pipeline.memory_table import shapes
from cai_cli.pipeline.plan import Step
from cai_cli.runtime import cost
from cai_cli.runtime.cost import RowFlow
from cai_cli.training.activations import ModelShape
from cai_cli.training.memory import GIB
from cai_cli.training.memory_check import H100, RESERVE
from cai_cli.training.options import TrainerOptions

GPUS = (1, 8)
BATCH = 512  # rows that the local engine decodes at once on CUDA
ELSEWHERE = ("openai:", "scripted:", "server:")


class _OneSize(dict[str, ModelShape]):
    """The same shape for every name of a model."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape

    def get(self, _name: object, _default: object = None) -> ModelShape:
        return self.shape


@dataclass(frozen=True)
class Needs:
    """What a step needs on a number of GPUs.

    Attributes:
        parts: Bytes on each GPU by what they are for; empty where no model runs there.
        hours: Until the step is done.
    """

    parts: Mapping[str, float]
    hours: float

    @property
    def peak(self) -> float:
        """Bytes on each GPU."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether an H100 has room for it, with a reserve."""
        return self.peak <= (1 - RESERVE) * H100.free

    def as_json(self) -> dict[str, Any]:
        """The needs as `--json` prints them."""
        memory = {name.replace(" ", "_"): round(size) for name, size in self.parts.items()}
        return {"memory": {**memory, "peak": round(self.peak), "fits": self.fits}, "hours": self.hours}


@dataclass(frozen=True)
class SizedStep:
    """A step of a run, and what it needs on each number of GPUs."""

    estimate: StepEstimate
    needs: Mapping[int, Needs] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The step as `--json` prints it."""
        plain = self.estimate.as_json()
        return {
            name: plain[name]
            for name in ("step", "rows", "requests", "prompt_tokens", "new_tokens", "trained_tokens", "command")
        } | {"gpus": {str(count): needs.as_json() for count, needs in self.needs.items()}}


def plan_size(steps: Sequence[Step], size: str) -> list[SizedStep]:
    """The steps of a run whose models have this size, one of `memory_table.shapes`."""
    shape = shapes()[size]
    return [
        SizedStep(estimate, {count: _needs(step, rows, estimate, shape, count) for count in GPUS})
        for step, rows, estimate in estimate_rows(steps)
    ]


def _needs(step: Step, rows: RowFlow, estimate: StepEstimate, shape: ModelShape, count: int) -> Needs:
    size = shape.parameters
    waiting = estimate.alone.gpu_hours(size)
    hours = (estimate.tokens - estimate.alone).gpu_hours(size) / count + waiting
    if step.stage.trains:
        config = _on_gpus(step.config, count)
        return Needs(setting_of(config, rows, _OneSize(shape), H100).memory.parts, hours)
    return Needs(_serving(step.config, rows, shape, count), hours)


def _on_gpus(config: TrainerOptions, count: int) -> TrainerOptions:
    """The options of a trainer on this number of GPUs."""
    if count == 1:
        return config.model_copy(update={"accelerate_config": None, "num_processes": None})
    trains_all = not config.lora and getattr(config, "epochs", 1) != 0
    launched = config.accelerate_config or ("fsdp2" if trains_all else "multi_gpu")
    return config.model_copy(update={"accelerate_config": launched, "num_processes": count})


def _serving(config: Any, rows: RowFlow, shape: ModelShape, count: int) -> dict[str, float]:
    """Bytes on each GPU of the models of a data step, in bfloat16.

    The KV cache takes at most half of what the weights leave free, as in the local engine; vLLM takes all of its share
    of the GPU, whatever the size of the model.
    """
    pm = getattr(config, "pm", None)
    judge = getattr(config, "judge", None) or getattr(config, "model", None)
    here = [
        parameters
        for name, parameters in ((pm, shape.scorer), (None if pm else judge, shape.parameters))
        if name and not name.startswith(ELSEWHERE) and not getattr(config, "pm_url", None)
    ]
    if not here:
        return {}
    weights = 2.0 * sum(here)
    weights /= 1 if weights <= (1 - RESERVE) * H100.free else count
    length = 2 * (rows.prompt_tokens + rows.reply_tokens) + getattr(config, "max_new_tokens", 0)
    batch = min(getattr(config, "batch_size", None) or BATCH, max(1, -(-rows.rows // count)))
    cache = 0.0 if pm else min(batch * length * shape.kv_values * 2, max(0.0, H100.free - weights) / 2)
    return {"weights": weights, "KV cache": cache} if cache else {"weights": weights}


def print_size(steps: Sequence[Step], size: str) -> None:
    """Print a table of the steps on stdout: tokens, and memory and hours on each number of GPUs."""
    planned = plan_size(steps, size)
    width = max(14, *(len(one.estimate.step) + 1 for one in planned))
    heads = [f"{what}, {count} GPU{'s' * (count > 1)}" for what in ("GiB each", "hours") for count in GPUS]
    titles = "".join(f"{head:>18}" for head in heads)
    print(f"{f'step, {size}':<{width}}{'prompt tokens':>15}{'new':>13}{'trained':>13}{titles}")

    def line(name: str, tokens: cost.TokenCounts, cells: Sequence[str]) -> str:
        counts = f"{tokens.prompt_tokens:>15,.0f}{tokens.new_tokens:>13,.0f}{tokens.trained_tokens:>13,.0f}"
        return f"{name:<{width}}{counts}{''.join(f'{cell:>18}' for cell in cells)}"

    for one in planned:
        memory = [f"{needs.peak / GIB:.1f}{'' if needs.fits else ' (no room)'}" for needs in one.needs.values()]
        hours = [format_hours(needs.hours) for needs in one.needs.values()]
        print(line(one.estimate.step, one.estimate.tokens, [*memory, *hours]))
    tokens = cost.total([one.estimate.tokens for one in planned])
    most = [f"{max(one.needs[count].peak for one in planned) / GIB:.1f}" for count in GPUS]
    hours = [format_hours(sum(one.needs[count].hours for one in planned)) for count in GPUS]
    print(line("all", tokens, [*most, *hours]))
    print(f"hours: {cost.ASSUMPTIONS}; without starting programs and loading models.")
    print(f"GiB: the most on each H100, of {H100.free / GIB:.0f}.")
