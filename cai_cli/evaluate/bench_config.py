"""The options of `cai eval bench`: the benchmark, the models that it compares, and the judge."""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import field_validator

from cai_cli.common.errors import UsageError
from cai_cli.engines import open_engine
from cai_cli.engines.base import Engine, Server
from cai_cli.engines.choice import PREFIXES, with_engine
from cai_cli.evaluate.benchmarks import BENCHMARKS
from cai_cli.models.names import public_name
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option, redefine
from cai_cli.runtime.shared_options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    InputOptions,
    OutputOptions,
    RequestOptions,
    RowInputOptions,
    SamplingOptions,
    named_values,
)

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.ASCII | re.DOTALL)
BenchmarkName = StrEnum("BenchmarkName", {name.upper(): name for name in BENCHMARKS})  # type: ignore[misc]


class BenchmarkArgument(StageConfig):
    """The first argument of the command."""

    benchmark: BenchmarkName = option(
        ..., "Benchmark that FILE belongs to.", Option(Effect.DECIDES, Group.INPUT, metavar="NAME", argument=True)
    )


class BenchConfig(OutputOptions, InputOptions, RequestOptions, SamplingOptions, BenchmarkArgument):
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
    judge: str | None = option(
        None,
        "Model that judges the replies: directory, Hub name or alias, or openai:NAME.",
        Option(Effect.HASHED, Group.MODEL),
    )
    judge_url: list[str] | None = option(
        None,
        "Address of the server of --judge, where it is not --base-url; can be repeated.",
        Option(Effect.HARMLESS, Group.SERVER, metavar="URL"),
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
        self.models()

    def _check_judged(self) -> None:
        if self.pm:
            raise UsageError("--pm is for rewardbench", hint="--model MODEL --judge MODEL", code="option-conflict")
        if not self.judge:
            raise UsageError(f"{self.benchmark} needs a model that judges", hint="--judge MODEL", code="missing-option")

    def models(self) -> dict[str, str]:
        """The models by their names in the results. Raises UsageError."""
        return named_models(self.pm or self.model or [DEFAULT_MODEL])

    def open_model(self, model: str) -> Engine:
        """The engine of a model under evaluation. Raises UsageError, CaiError."""
        return self._open(model, self.base_url)

    def open_judge(self) -> Engine:
        """The engine of the judge. Raises UsageError, CaiError."""
        return self._open(str(self.judge), self.judge_url or self.base_url)

    def _open(self, model: str, url: Sequence[str] | None) -> Engine:
        """As `open_engine` of other stages; options that only the other model can have are left out."""
        fits: dict[str, Any] = {"batch_size": None, "device": "auto", "dtype": "auto"}
        server = Server(url, self.concurrency, self.timeout, self.budget_tokens, self.price_in, self.price_out,
                        self.served_as)  # fmt: skip
        if not model.startswith("openai:"):
            fits = {"batch_size": self.batch_size, "device": self.device.value, "dtype": self.dtype.value}
            server = Server()
        chosen = with_engine(model, self.device.value)
        if chosen.startswith("vllm:"):
            fits["device"] = "auto" if chosen != model else self.device.value
            fits["engine_args"] = named_values(self.engine_arg)
        return open_engine(chosen, **fits, server=server, chat=self.chat_options())


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
