"""The options of `cai eval bench`: the benchmark, the models that it compares, and the judge."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import field_validator

from cai_cli.common.errors import UsageError
from cai_cli.engines.choice import PREFIXES
from cai_cli.evaluate.benchmarks import BENCHMARKS
from cai_cli.evaluate.judged_options import JudgedOptions, refuse_idle_server_options
from cai_cli.models.names import public_name
from cai_cli.reward.scorer import refuse_int8
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option, redefine
from cai_cli.runtime.shared_options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    InputOptions,
    OutputOptions,
    RowInputOptions,
    SamplingOptions,
)

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.ASCII | re.DOTALL)
BenchmarkName = StrEnum("BenchmarkName", {name.upper(): name for name in BENCHMARKS})  # type: ignore[misc]


class BenchmarkArgument(StageConfig):
    """The first argument of the command."""

    benchmark: BenchmarkName = option(
        ..., "Benchmark that FILE belongs to.", Option(Effect.DECIDES, Group.INPUT, metavar="NAME", argument=True)
    )


class BenchConfig(OutputOptions, InputOptions, JudgedOptions, SamplingOptions, BenchmarkArgument):
    """Score models on a published benchmark.

    FILE: the file of HarmBench, StrongREJECT, AdvBench or SORRY-Bench as its authors publish it, to which each --model
    replies and --judge judges; or that of RewardBench, whose pairs each --pm or --model decides. Writes one row for
    each model and prompt, and the scores to OUT.bench.json, which `cai report` draws.
    """

    input: str = option(
        ...,
        "The benchmark's file (docs/benchmarks.md), or - for stdin.",
        Option(Effect.HASHED, Group.INPUT, metavar="FILE", reads_file=True, argument=True),
    )
    skip_invalid: bool = redefine(RowInputOptions, "skip_invalid", False)
    max_invalid: int | None = redefine(RowInputOptions, "max_invalid", None)
    model: list[str] | None = option(
        None,
        f"Model to evaluate; repeat it to compare several with the first, NAME=MODEL names it. {MODEL_HELP} By default "
        f"{DEFAULT_MODEL}. With rewardbench it is the judge of the pairs.",
        Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")),
    )
    pm: list[str] | None = option(
        None,
        "Preference model that decides the pairs of rewardbench, from `cai train-pm`; can be repeated.",
        Option(Effect.HASHED, Group.MODEL),
    )
    n: int = option(1, "Replies to each prompt.", Option(flags=("--n", "-n")), ge=1)
    max_new_tokens: int = redefine(SamplingOptions, "max_new_tokens", 512)
    temperature: float = redefine(SamplingOptions, "temperature", 0.0)

    @field_validator("model", "pm", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:  # as the `model` of a run file is
        return [value] if isinstance(value, str) else value

    def check(self) -> None:
        super().check()
        if self.benchmark != "rewardbench":
            self._check_judged()
        elif self.judge or self.judge_url:
            raise UsageError(
                "rewardbench has no --judge: its models decide the pairs",
                hint="give the judge as --model",
                code="option-conflict",
            )
        elif self.pm and self.model:
            raise UsageError("give either --pm or --model", code="option-conflict")
        elif self.n > 1:
            raise UsageError(
                "-n is for benchmarks that sample replies, and rewardbench has none", code="option-conflict"
            )
        if self.pm:
            refuse_int8(self)
        refuse_idle_server_options(self, [*self.models().values(), self.judge or ""])

    def _check_judged(self) -> None:
        if self.pm:
            raise UsageError("--pm is for rewardbench", hint="--model MODEL --judge MODEL", code="option-conflict")
        if not self.judge:
            raise UsageError(f"{self.benchmark} needs a model that judges", hint="--judge MODEL", code="missing-option")

    def models(self) -> dict[str, str]:
        """The models by their names in the results. Raises UsageError."""
        return named_models(self.pm or self.model or [DEFAULT_MODEL])


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Return name -> model.

    Args:
        given: MODEL, which is named by its folder, alias or Hub name, or NAME=MODEL.

    Raises:
        UsageError: Two models have the same name.

    Examples:
        >>> named_models(["smollm2-135m", "after=runs/demo/rl-cai"])
        {'smollm2-135m': 'smollm2-135m', 'after': 'runs/demo/rl-cai'}
    """
    models: dict[str, str] = {}
    for text in given:
        match = None if Path(text).exists() else NAMED.fullmatch(text)
        name, model = (match[1], match[2]) if match else (_name_of(text), text)
        if name in models:
            raise UsageError(f"two models have the name {name!r}", hint="name them: NAME=MODEL", code="option-conflict")
        models[name] = model
    return models


def _name_of(model: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if model.startswith(prefix)), "")
    return public_name(model.removeprefix(prefix))
