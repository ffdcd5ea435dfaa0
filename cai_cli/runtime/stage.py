"""The declaration of a stage: its name, its config, the function that runs it and its cost estimate."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Any

from cai_cli.data.schema import Row
from cai_cli.runtime.config import StageConfig
from cai_cli.runtime.cost import RowFlow, StepCost
from cai_cli.runtime.output_files import reuse_recorded_date


class Phase(StrEnum):
    """The headings of `cai --help`."""

    SUPERVISED = "Phase 1: supervised learning"
    FEEDBACK = "Phase 2: reinforcement learning from AI feedback"
    EVALUATION = "Evaluation"


@dataclass(frozen=True)
class Stage:
    """One stage, declared in its own module and listed once in `cai_cli.pipeline.registry`.

    Attributes:
        name: The subcommand, such as `label-prefs` or `eval compare`.
        phase: The heading it is listed under.
        config: Its options; the docstring is the help of the command.
        run: Runs it and returns the summary. A date in the chat template is that of an earlier run of the output.
        estimate: The cost of running it on the rows of a `RowFlow`.
        reads: Types of the rows it accepts.
        writes: Type of the rows it writes; None where it writes a model directory.
    """

    name: str
    phase: Phase
    config: type[StageConfig]
    run: Callable[[Any], dict[str, Any]]
    estimate: Callable[[RowFlow, Any], StepCost]
    reads: tuple[type[Row], ...]
    writes: type[Row] | None

    def __post_init__(self) -> None:
        run = self.run

        @wraps(run)
        def with_recorded_date(config: Any) -> dict[str, Any]:
            if not getattr(config, "overwrite", True):
                reuse_recorded_date(str(config.output))
            return run(config)

        object.__setattr__(self, "run", with_recorded_date)

    @property
    def trains(self) -> bool:
        """Whether it writes a model directory instead of rows."""
        return self.writes is None
