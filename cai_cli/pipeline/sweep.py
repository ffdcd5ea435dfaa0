"""Sweeps in a run file: with a list for a setting, its step and every step that depends on it run once per value.

    revisions: {command: critique-revise, input: "@samples", rounds: [0, 1, 2, 3, 4]}
    sl-cai:    {command: sft, input: "@revisions"}                              # five models
    after:     {command: sample, input: red_team.jsonl, model: "@sl-cai"}       # five files of samples
    compare:   {command: eval compare, input: ["@after@*"], pm: "@pm"}          # one step over all five

Steps that do not depend on the list run once. Several lists expand to all combinations of their values; a step that
reads two swept steps reads the variants with its own values. `@step@*` names all variants of a step, for an option that
takes several values. Rounds of revision continue one another: the variant with 2 rounds adds one round to the rows of
the variant with 1, which gives the same rows as two rounds at once. A list of clamps judges each pair once.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.runtime.manifest import read_manifest, write_json
from cai_cli.runtime.output_files import sidecar

MAX_STEPS = 256
LONGEST_NAME = 160  # bytes; file names may have 255, and the endings of sidecars need the rest
Value = str | int | float | bool | None
Given = Mapping[str, Any]
Choice = Mapping[str, Value]  # "step.setting" -> its value
TakesMany = Callable[[Any], frozenset[str]]  # command -> its options for which a list is one value


@dataclass(frozen=True)
class Variant:
    """One variant of a swept step: its name, and the values of the swept settings."""

    name: str
    choice: Choice


def expand(steps: Mapping[str, Given], takes_many: TakesMany, shared: Given | None = None) -> dict[str, dict[str, Any]]:
    """Replace each swept step by its variants.

    Args:
        steps: The steps of the run file by name.
        takes_many: The options of a command for which a list is one value.
        shared: Settings with a list of the run: all steps that have this list take the same value of it.

    Returns:
        The steps without sweeps in order, by their new names such as `sl-cai@rounds=2`.

    Raises:
        UsageError: A list is empty or has equal values, two names collide, or there are too many steps.
    """

    def axis_of(step: str, setting: str) -> str:
        """The rounds of a step have one axis, so that a variant takes the same value in every round."""
        is_shared = shared is not None and steps[step].get(setting, ()) == shared.get(setting)
        return setting if is_shared else f"{step.partition('@')[0]}.{setting}"

    axes = list(
        dict.fromkeys(axis_of(step, setting) for step, given in steps.items() for setting in _lists(given, takes_many))
    )
    swept = Counter(axis.rpartition(".")[2] for axis in axes)
    known: dict[str, list[Variant]] = {}
    flat: dict[str, dict[str, Any]] = {}
    for step, given in steps.items():
        lists = _checked(step, _lists(given, takes_many))
        many = takes_many(given.get("command"))
        variants: list[Variant] = []
        for picked in product(*lists.values()):
            settings = dict(given) | dict(zip(lists, picked, strict=True))
            settings |= {o: _gathered(settings[o], known) for o in many & settings.keys()}
            own = {axis_of(step, setting): value for setting, value in zip(lists, picked, strict=True)}
            for values in _choices(own, _references(settings), known):
                choice = {axis: values[axis] for axis in axes if axis in values}
                variant = Variant(step + _suffix(choice, swept), choice)
                _check_name(step, variant.name, flat)
                flat[variant.name] = {o: _resolved(value, choice, known) for o, value in settings.items()}
                variants.append(variant)
                if len(flat) > MAX_STEPS:
                    raise UsageError(
                        f"step {step!r}: the lists expand to more than {MAX_STEPS} steps", code="invalid-run-file"
                    )
        if given.get("command") == "critique-revise" and _whole_numbers(lists.get("rounds", [None])):
            _continue_rounds(axis_of(step, "rounds"), variants, flat)
        if given.get("command") == "label-prefs" and "clamp" in lists and "votes" not in given:
            _reuse_votes(axis_of(step, "clamp"), variants, flat)
        known[step] = variants
    return flat


def _check_name(step: str, name: str, flat: Mapping[str, Any]) -> None:
    """Raises UsageError where the name of a variant is taken or too long."""
    if name in flat or len(name) > LONGEST_NAME:
        problem = "would be the name of two steps" if name in flat else "is too long for a file"
        raise UsageError(
            f"step {step!r}: {name!r} {problem}", hint="use other or fewer values", code="invalid-run-file"
        )


def _lists(given: Given, takes_many: TakesMany) -> dict[str, list[Value]]:
    """The settings of a step that have a list of values to sweep."""
    not_swept = takes_many(given.get("command")) | {"command"}
    return {setting: value for setting, value in given.items() if isinstance(value, list) and setting not in not_swept}


def _checked(step: str, lists: dict[str, list[Value]]) -> dict[str, list[Any]]:
    """The lists with whole numbers in ascending order. Raises UsageError where one is empty or has equal values."""
    for setting, values in lists.items():
        if len(values) == 0 or len({_slug(value) for value in values}) < len(values):
            raise UsageError(
                f"step {step!r}: {setting}: a list needs one or more distinct values",
                hint=f"it is {values}",
                code="invalid-run-file",
            )
    return {setting: sorted(v) if _whole_numbers(v) else v for setting, v in lists.items()}


def _whole_numbers(values: Sequence[Value]) -> bool:
    return all(type(value) is int for value in values)


def _continue_rounds(axis: str, variants: Sequence[Variant], flat: dict[str, dict[str, Any]]) -> None:
    """Make each variant start from the rows of the one with fewer rounds.

    That gives the same rows, because the draws of a round depend on the row and the round alone.
    """
    values = list(dict.fromkeys(variant.choice[axis] for variant in variants))
    fewer = dict(zip(values[1:], values, strict=False))
    for variant in variants:
        rounds: Any = variant.choice[axis]
        if rounds in fewer:
            before = _sibling(variant, axis, fewer[rounds], variants)
            flat[variant.name] |= {"input": f"@{before.name}", "rounds": rounds - fewer[rounds]}


def _reuse_votes(axis: str, variants: Sequence[Variant], flat: dict[str, dict[str, Any]]) -> None:
    """Make the variants with further clamps reuse the votes of the first one, which are recorded unclamped."""
    first = variants[0].choice[axis]
    for variant in variants:
        if variant.choice[axis] != first:
            flat[variant.name]["votes"] = f"@{_sibling(variant, axis, first, variants).name}"


def _sibling(variant: Variant, axis: str, value: Value, variants: Sequence[Variant]) -> Variant:
    """The variant with this value of `axis` and all other values those of `variant`."""
    choice = {**variant.choice, axis: value}
    return next(other for other in variants if other.choice == choice)


# --- references between steps -------------------------------------------------------------------------------------


def split_name(text: str) -> tuple[str, str]:
    """`NAME=FILE` -> ("NAME=", "FILE"), `FILE` -> ("", "FILE")."""
    name, rest = re.fullmatch(r"((?:[A-Za-z0-9][\w.-]*=)?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return name, rest


def split_reference(value: object) -> tuple[str, str] | None:
    """`@step` -> ("", "step"), `NAME=@step` -> ("NAME=", "step"); None for a value that refers to no step."""
    name, rest = split_name(value) if isinstance(value, str) else ("", "")
    return (name, rest[1:]) if rest.startswith("@") else None


def map_references(value: Any, seen: Callable[[str], Iterable[str]]) -> list[Any]:
    """The values that `value` stands for: itself, or for a reference those that `seen` gives for its step."""
    reference = split_reference(value)
    return [f"{reference[0]}{one}" for one in seen(reference[1])] if reference else [value]


def _references(settings: Given) -> list[str]:
    """The steps that the settings refer to."""
    values = [v for value in settings.values() for v in (value if isinstance(value, list) else [value])]
    return [reference[1] for v in values if (reference := split_reference(v))]


def _choices(own: Choice, references: Iterable[str], known: Mapping[str, Sequence[Variant]]) -> list[Choice]:
    """All combinations of a step's own values with those of the steps it reads, where they agree."""
    choices: list[Choice] = [own]
    for step in references:
        if step in known:
            agreeing = ((c, v.choice) for c in choices for v in known[step])
            joined = ({**a, **b} for a, b in agreeing if all(a.get(axis, b[axis]) == b[axis] for axis in b))
            choices = list(islice(joined, MAX_STEPS + 1))
    return choices


def _resolved(value: Any, choice: Choice, known: Mapping[str, Sequence[Variant]]) -> Any:
    """A setting with each reference to a swept step replaced by one to its variant."""
    if isinstance(value, list):
        return [_resolved(inner, choice, known) for inner in value]
    reference = split_reference(value)
    if reference is None or reference[1] not in known:
        return value
    variant = next(v for v in known[reference[1]] if v.choice.items() <= choice.items())
    return f"{reference[0]}@{variant.name}"


def _gathered(value: Any, known: Mapping[str, Sequence[Variant]]) -> list[Any]:
    """The values of an option that takes several, with `@step@*` replaced by all variants of the step."""
    return [one for v in (value if isinstance(value, list) else [value]) for one in _all_variants(v, known)]


def _all_variants(value: Any, known: Mapping[str, Sequence[Variant]]) -> list[Any]:
    step = value.removeprefix("@").removesuffix("@*") if isinstance(value, str) else ""
    if step in known and value == f"@{step}@*":
        return [f"@{variant.name}" for variant in known[step]]
    return [value]


# --- names --------------------------------------------------------------------------------------------------------


def _suffix(choice: Choice, swept: Counter[str]) -> str:
    """The suffix `@rounds=2`; with the step's name where two steps sweep a setting of the same name."""
    parts = []
    for axis, value in choice.items():
        setting = axis.rpartition(".")[2]
        parts.append(f"@{setting if swept[setting] == 1 else axis}={_slug(value)}")
    return "".join(parts)


def _slug(value: Value) -> str:
    """A value as a part of a file name."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).removeprefix("@")
    return re.sub(r"[^A-Za-z0-9_.,=@-]+", "-", text)


# --- curves -------------------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(.+)@([\w.-]+)=(\d+(?:\.\d+)?)")


def write_curves(compared: Iterable[Path]) -> None:
    """Write the curves of numeric sweeps, as `NAME.STEP.AXIS.sweep.json`.

    A curve is the preference model's mean score, or the Elo rating where there is none, over the values of the setting.
    `simultaneous` is the number of simultaneous intervals in the comparison.

    Args:
        compared: Outputs of `cai eval compare`.
    """
    for output in compared:
        comparison = read_manifest(sidecar(output, "compare.json")) or {"ratings": {}}
        for axis in comparison["ratings"]:
            scores = comparison["scores"][axis]
            figure = f"{'PM score' if scores else 'Elo'}, {axis}"
            simultaneous = comparison.get("simultaneous", {}).get("scores" if scores else "ratings", 1)
            for (step, setting), points in _curves(scores or comparison["ratings"][axis]):
                path = output.with_name(f"{output.name.removesuffix('.jsonl')}.{step}.{axis}.sweep.json")
                curve = {"setting": setting, "figure": figure, "points": points, "simultaneous": simultaneous}
                write_json(path, curve)


def _curves(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], list[dict[str, Any]]]]:
    """(step, setting), and the points of its variants, of which there are at least two."""
    numbered = [(m, row) for row in rows if (m := _NUMBERED.fullmatch(row["model"]))]
    numbered.sort(key=lambda item: (item[0][1], item[0][2], float(item[0][3])))
    for swept, group in groupby(numbered, key=lambda item: (item[0][1], item[0][2])):
        points = [{"at": float(m[3]), **{k: row[k] for k in ("value", "low", "high", "n")}} for m, row in group]
        if len(points) > 1:
            yield swept, points
