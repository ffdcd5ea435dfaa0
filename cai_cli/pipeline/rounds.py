"""Rounds in a run file: `repeat: N` over steps that start from the model of the round before.

    rounds:
      repeat: 3
      start: "@sl-cai"                     # what `@policy@last` is in the first round
      carry: all                           # train on the pairs of earlier rounds too
      stop: {monitor: policy, hours: 12}
      steps:
        pairs:       {command: sample, input: red_team.jsonl, model: "@policy@last", n: 2}
        preferences: {command: label-prefs, input: "@pairs"}
        policy:      {command: dpo, input: "@preferences", model: "@policy@last", monitor-judge: smollm2-360m}
    after: {command: sample, input: evaluation.jsonl, model: "@policy"}

Rounds become ordinary steps when the file is read: `pairs@1`, `preferences@1`, ..., `policy@3`. In the block `@step` is
the step of the same round and `@step@last` that of the round before. After the block `@step` is the step of the round
whose model is kept, and `@step@*` those of all rounds, for an option that takes several values.

Data stages of round k that set no seed use that of the run plus k - 1, so that a policy that has not changed gives new
replies. The trainers keep the seed, because it decides which prompts are held out, and a prompt that one round trains
on must not be held out by the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cai_cli.common.errors import UsageError
from cai_cli.data.schema import Preference
from cai_cli.pipeline.registry import STAGES, takes_many
from cai_cli.pipeline.sweep import Given, Value, map_references
from cai_cli.runtime.stage import Phase
from cai_cli.runtime.step_names import round_of

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of a run or a step, because it becomes a file name
StepName = Annotated[str, Field(pattern=NAME)]
MAX_ROUNDS = 64
LAST, EVERY = "@last", "@*"


class Carry(StrEnum):
    """Which preference data the trainers of a round use: those of all rounds so far, or of this one."""

    ALL = "all"
    LAST = "last"


class Stop(BaseModel):
    """When the rounds end early.

    Attributes:
        monitor: The step that trains the policy: the rounds end after one in which its monitor's score has not risen.
        tokens: No round begins that is expected to bring the tokens read, written and trained on above this.
        money: The same for the price of the requests to servers, in the currency of their prices.
        hours: The same for the hours that the steps take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    monitor: str | None = None
    tokens: float | None = Field(default=None, gt=0)
    money: float | None = Field(default=None, gt=0)
    hours: float | None = Field(default=None, gt=0)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        return {name: value for name in ("tokens", "money", "hours") if (value := getattr(self, name)) is not None}

    def __bool__(self) -> bool:
        return bool(self.monitor or self.budgets)


class Repeat(BaseModel):
    """Steps of a run file that are repeated in rounds.

    Attributes:
        repeat: The number of rounds.
        steps: The steps of a round.
        start: What a reference to the last round is in the first one; None for the model of the run.
        carry: Which preference data a round trains on.
        stop: When the rounds end early.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repeat: int = Field(ge=1, le=MAX_ROUNDS)
    steps: dict[StepName, dict[str, Value | list[Value]]] = Field(min_length=1)
    start: str | None = None
    carry: Carry = Carry.LAST
    stop: Stop = Stop()


@dataclass(frozen=True)
class Ending:
    """Where the rounds of a block end.

    Attributes:
        ran: The number of rounds that are run.
        result: The round that later steps refer to.
    """

    ran: int
    result: int


def expand_rounds(
    steps: Mapping[str, "Repeat | Given"], model: str, seed: int, endings: Mapping[str, Ending]
) -> dict[str, dict[str, Any]]:
    """Replace each block of rounds by its steps.

    Args:
        steps: The steps and blocks of the run file by name.
        model: Default model of the run.
        seed: Default random seed of the run.
        endings: Where the blocks end that have ended early, by name.

    Returns:
        The steps in order. Those of round 2 are named `step@2`.

    Raises:
        UsageError: Two steps have the same name, or `stop` cannot be applied.
    """
    flat: dict[str, dict[str, Any]] = {}
    known: dict[str, tuple[Repeat, Ending]] = {}  # the steps of earlier blocks
    names = [n for name, given in steps.items() for n in (given.steps if isinstance(given, Repeat) else [name])]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two steps have the name {doubled!r}", hint="rename one of them", code="invalid-run-file")
    for name, given in steps.items():
        if not isinstance(given, Repeat):
            flat[name] = _rewritten(given, _seen_from_outside(known))
            continue
        ending = endings.get(name, Ending(given.repeat, given.repeat))
        for number in range(1, ending.ran + 1):
            inside = _seen_from_round(given, number, model, _seen_from_outside(known))
            for step, settings in given.steps.items():
                flat[f"{step}@{number}"] = _of_round(step, settings, given, number, seed, inside)
        known |= dict.fromkeys(given.steps, (given, ending))
    return flat


Seen = Callable[[str], list[str]]  # the step of a reference -> the values it stands for


def _seen_from_outside(known: Mapping[str, tuple[Repeat, Ending]]) -> Seen:
    def seen(step: str) -> list[str]:
        base = step.removesuffix(EVERY)
        if base in known:
            _, ending = known[base]
            if step.endswith(EVERY):
                return [f"@{base}@{number}{EVERY}" for number in range(1, ending.ran + 1)]
            return [f"@{base}@{ending.result}"]
        if (at := round_of(step)) and at[0] in known and known[at[0]][0].stop and at[1] > 1:
            raise UsageError(
                f"@{step}: the rounds may end before round {at[1]}",
                hint=f"@{at[0]} is that of the round whose model is kept",
                code="unknown-step",
            )
        return [f"@{step}"]

    return seen


def _seen_from_round(block: Repeat, number: int, model: str, outside: Seen) -> Seen:
    def seen(step: str) -> list[str]:
        base = step.removesuffix(EVERY).removesuffix(LAST)
        if base not in block.steps:
            return outside(step)
        if not step.endswith(LAST):
            return [f"@{base}@{number}{step.removeprefix(base)}"]
        if number > 1:
            return [f"@{base}@{number - 1}"]
        start = block.start or model
        return outside(start.removeprefix("@")) if start.startswith("@") else [start]

    return seen


def _of_round(step: str, given: Given, block: Repeat, number: int, seed: int, seen: Seen) -> dict[str, Any]:
    """The settings of a step in one round."""
    settings = _rewritten(given, seen)
    stage = STAGES.get(str(given.get("command")))
    if stage is None or number == 1:
        return settings
    options = stage.config.option_names()
    if "seed" in options and not stage.trains and stage.phase is not Phase.EVALUATION:
        settings.setdefault("seed", seed + number - 1)
    source = str(given.get("input"))
    carries = Preference in stage.reads and "also" in options and block.carry is Carry.ALL
    if carries and source.removeprefix("@") in block.steps:
        earlier = [f"{source}@{before}" for before in range(1, number)]
        settings["also"] = [*settings.get("also", []), *earlier]
    return settings


def _rewritten(given: Given, seen: Seen) -> dict[str, Any]:
    """The settings with every reference replaced by what it stands for."""
    many = takes_many(given.get("command"))
    settings: dict[str, Any] = {}
    for option, value in given.items():
        if isinstance(value, list) or option in many:
            values = value if isinstance(value, list) else [value]
            replaced = [one for v in values for one in map_references(v, seen)]
            settings[option] = replaced if isinstance(value, list) or len(replaced) > 1 else replaced[0]
        else:
            settings[option] = map_references(value, seen)[0]
    return settings
