"""The run file of `cai run`: its fields and how it is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.yaml import load_yaml, parse_yaml
from cai_cli.pipeline.registry import STAGES
from cai_cli.pipeline.rounds import NAME, Repeat, StepName
from cai_cli.pipeline.sweep import LONGEST_NAME, Value
from cai_cli.runtime.shared_options import DEFAULT_MODEL

STEP, ROUNDS = "(step)", "(rounds)"  # how pydantic tells the two apart; no name of a step


def _kind(value: Any) -> str:
    return (
        ROUNDS
        if isinstance(value, Repeat) or (isinstance(value, dict) and "repeat" in value and "command" not in value)
        else STEP
    )


Entry = Annotated[
    Annotated[dict[str, Value | list[Value]], Tag(STEP)] | Annotated[Repeat, Tag(ROUNDS)], Discriminator(_kind)
]


class BeforeAfter(BaseModel):
    """A step with replies of the start model, and one with replies of the final model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: str
    after: str


class Outcome(BaseModel):
    """The steps that tell what a run changed.

    Attributes:
        win_rate: A step of `eval compare`, whose last model is compared with its first.
        refusals: Two steps whose replies are compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    win_rate: str | None = Field(None, min_length=1)
    refusals: BeforeAfter | None = None

    @model_validator(mode="after")
    def _names_a_step(self) -> Self:
        if self.win_rate is None and self.refusals is None:
            raise ValueError("needs win_rate, refusals or both")
        return self


class RunFile(BaseModel):
    """A run file.

    Attributes:
        name: Name of the run, and of its folder under runs/.
        model: Default model of the steps.
        seed: Default random seed of the steps.
        constitution: Constitution of the steps that ask about principles: a YAML file, or a directory with one for
            critiques and one for preferences. A list runs these steps, and those that depend on them, once for each.
        steps: Step name -> its command, its input and its options; or steps that are repeated in rounds.
        outcome: The steps that tell what the run changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    model: str = DEFAULT_MODEL
    seed: int = 0
    constitution: str | Annotated[list[str], Field(min_length=1)] | None = None
    steps: dict[StepName, Entry] = Field(min_length=1)
    outcome: Outcome | None = None

    @property
    def blocks(self) -> dict[str, Repeat]:
        """The steps that are repeated in rounds, by the name of the block."""
        return {name: given for name, given in self.steps.items() if isinstance(given, Repeat)}


def load_run(path: Path, changes: Sequence[str] = ()) -> RunFile:
    """Read the run file at `path`.

    Args:
        path: The file.
        changes: NAME=VALUE, each a setting that replaces one of the file (see `_change`).

    Raises:
        CaiError: It is not YAML, or a field is invalid; the message names the first one.
        UsageError: A change names no step or option of the file.
    """
    try:
        content = load_yaml(path)
        if not isinstance(content, dict):
            raise CaiError(f"{path}: not a run file: it has no `name` and `steps`", code="invalid-run-file")
        if changes:
            RunFile.model_validate(content)  # so that a change meets steps
        for change in changes:
            _change(content, change)
        return RunFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in (STEP, ROUNDS))
        raise CaiError(f"{path}: {where}: {first['msg']}", code="invalid-run-file") from None


def _change(content: dict[str, Any], change: str) -> None:
    """Replace one setting of a run file.

    Args:
        content: The file as it was read, which is changed.
        change: FIELD=VALUE for a field of the run, STEP.OPTION=VALUE, or *.OPTION=VALUE for all steps that have the
            option. VALUE is YAML.

    Raises:
        UsageError: There is no such step, or no step has the option.
    """
    name, equals, text = change.partition("=")
    step, dot, option = name.rpartition(".")
    if not (equals and option) or (dot and not step) or (not dot and option not in RunFile.model_fields):
        raise UsageError(f"--set {change}: not FIELD=VALUE or STEP.OPTION=VALUE", code="invalid-option")
    value = parse_yaml(text, f"--set {name}")
    blocks = [given["steps"] for given in content["steps"].values() if _kind(given) == ROUNDS]
    steps = {name: given for group in (content["steps"], *blocks) for name, given in group.items()}
    if not dot:
        content[option] = value
    elif step != "*":
        if step not in steps:
            raise UsageError(f"--set {change}: no step {step!r}", code="unknown-step")
        steps[step][option] = value
    else:
        having = [given for given in steps.values() if option in _options(given.get("command"))]
        if not having:
            raise UsageError(f"--set {change}: no step has the option {option!r}", code="unknown-option")
        for given in having:
            given[option] = value


def _options(command: Any) -> dict[str, str]:
    stage = STAGES.get(str(command))
    return stage.config.option_names() if stage else {}
