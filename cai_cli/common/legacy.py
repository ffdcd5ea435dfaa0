"""The one table of names that earlier versions used: in options, manifests, rows and digests.

What version 0.1.0 wrote is read under today's names, and its unfinished outputs are resumed. Nothing else in the tree
knows an old name.
"""

from collections.abc import Mapping
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
# The same of the fields of rows, of the columns of metrics.jsonl and of the metrics in a manifest.
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
