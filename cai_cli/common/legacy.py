"""The one table of names that earlier versions used: in options, manifests, rows and digests.

What version 0.1.0 wrote is read under today's names, and its unfinished outputs are resumed. Nothing else in the tree
knows an old name.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, TypeVar

V = TypeVar("V")

# Old name -> new name, of options and of the settings and inputs that a manifest records under the option's name.
OPTIONS = {
    "prompt_form": "prompt_format",
    "shown": "num_examples",
    "avoid": "exclude",
    "skip_bad": "skip_invalid",
    "max_bad": "max_invalid",
    "watch_pm": "monitor_pm",
    "watch_judge": "monitor_judge",
}
# The same for the fields of rows, the columns of metrics.jsonl and the metrics in a manifest.
FIELDS = {"watch_score": "monitor_score", "watch_score_before": "monitor_score_before"}


def renamed(value: Mapping[str, V], names: Mapping[str, str]) -> dict[str, V]:
    """`value` with today's keys, in the same order."""
    return {names.get(key, key): inner for key, inner in value.items()}


def old_names(name: str) -> list[str]:
    """The names under which earlier versions wrote the field `name`."""
    return [old for old, new in FIELDS.items() if new == name]


def metrics_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl under today's names."""
    return renamed(row, FIELDS)


# --- manifests ----------------------------------------------------------------------------------------------------

# Version -> the earlier versions whose unfinished outputs it resumes, because the same command wrote the same rows.
CONTINUES = {"0.2.0": frozenset({"0.1.0"})}
# Version -> the stages that, at equal settings, write other rows or train another model than in earlier versions.
# Finished outputs of earlier versions are still recognised; unfinished ones are not resumed.
CHANGED_STAGES: dict[str, frozenset[str]] = {
    "0.2.0": frozenset(
        {
            "critique",
            "critique-revise",
            "eval compare",
            "eval harm",
            "label-prefs",
            "revise",
            "red-team",
            "rl",
            "sample",
            "score",
            "sft",
            "train-pm",
        }
    )
}
# Setting that an earlier version did not have -> the value that gives the behaviour of that version.
ADDED_SETTINGS: dict[str, Any] = {
    "cut_off": "whole",
    "drop_system": False,
    "scale_rewards": "group",
    "weights": "float32",
    "optimizer": "adamw",
    "rollouts": "local",
    "packing": False,
    "pm_dtype": "float32",
    "reference_weights": "float32",
    "keep_adapter": False,
    "rubric": "scale",
    "read_at": "end-of-turn",
}
MANIFEST = {"figures": "metrics"}
PROVENANCE = {"watcher": "monitor"}


def current_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest under today's names, except in its provenance, which a resumed run keeps as it was recorded."""
    current = renamed(manifest, MANIFEST)
    if isinstance(current.get("metrics"), Mapping):
        current["metrics"] = renamed(current["metrics"], FIELDS)
    return current


def current_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance, or a part of one, under today's names."""
    current = renamed(provenance, PROVENANCE)
    for part in ("settings", "input"):
        if isinstance(current.get(part), Mapping):
            current[part] = renamed(current[part], OPTIONS)
    return current


def same_value(name: str, one: Any, other: Any) -> bool:
    """Whether two provenances agree in the value `name`, such as `settings.seed`; None where one does not have it."""
    if name == "cai":
        return one == other or one in CONTINUES.get(other, ()) or other in CONTINUES.get(one, ())
    if name.endswith("template_date") and None in (one, other):  # 0.1.0 did not record it
        return True
    if one is None or other is None:
        added = ADDED_SETTINGS.get(name.removeprefix("settings."))
        return one == other or (added is not None and added in (one, other))
    return bool(one == other)


def changed_between(stage: str, one: str, other: str) -> bool:
    """Whether the stage does something else in one version than in the other."""
    earlier, later = sorted((_numbers(one), _numbers(other)))
    return any(stage in stages and earlier < _numbers(version) <= later for version, stages in CHANGED_STAGES.items())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


# --- digests of work items ----------------------------------------------------------------------------------------

# Class name -> its name in version 0.1.0, whose digests were made from the repr of a value.
CLASSES = {"RevisionRound": "Turn", "ReplyPair": "Match"}
_CLASS = re.compile(rf"\b({'|'.join(CLASSES)})\(")


def has_repr_digests(version: str) -> bool:
    """Whether that version wrote digests of the repr to `OUT.units.jsonl`."""
    return version == "0.1.0"


def repr_digest(value: object) -> int:
    """The digest that version 0.1.0 recorded for the value of a work item: 32 bits of the hash of its repr."""
    text = _CLASS.sub(lambda found: f"{CLASSES[found[1]]}(", repr(value))
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little")
