"""Published sets of prompts by which models are compared, read by their own columns.

Each reader gives the prompt as the set's authors send it, its id where the set has one, and the groups by which the
authors report: HarmBench (arXiv 2402.04249), StrongREJECT (2402.10260), AdvBench (2307.15043), SORRY-Bench
(2406.14598). RewardBench (2403.13787) is read as pairs by `shapes`; its groups are its subsets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.schema import json_type

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedPrompt:
    """One prompt of a published set.

    Attributes:
        text: The prompt as the authors send it.
        id: Its id in the set; None where the set has none.
        groups: The categories by which results are reported.
    """

    text: str
    id: str | None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedSet:
    """A published set and how its rows are read.

    Attributes:
        title: Its name as its authors write it.
        file: The name of its file.
        marks: The columns that mark its rows.
        columns: The columns that the reader uses.
        read: Reads a row; None for pairs. Raises RowError.
    """

    title: str
    file: str
    marks: frozenset[str]
    columns: frozenset[str] = frozenset()
    read: Callable[[Row], PublishedPrompt] | None = None


def _harmbench(row: Row) -> PublishedPrompt:
    """The context of a contextual behavior comes before it, after which the authors put a line of dashes."""
    if row.get("ImageFileName"):
        raise UnusableRow("a prompt with an image")
    behavior, context = _text(row, "Behavior"), _optional(row, "ContextString")
    groups = (_optional(row, "FunctionalCategory"), _optional(row, "SemanticCategory"))
    text = f"{context}\n\n---\n\n{behavior}" if context else behavior
    return PublishedPrompt(text, _text(row, "BehaviorID"), tuple(filter(None, groups)))


def _strongreject(row: Row) -> PublishedPrompt:
    category = _optional(row, "category")
    return PublishedPrompt(_text(row, "forbidden_prompt"), None, (category,) if category else ())


def _advbench(row: Row) -> PublishedPrompt:
    return PublishedPrompt(_text(row, "goal"), None)


def _sorrybench(row: Row) -> PublishedPrompt:
    """A question of one turn. The files of several styles have the same ids, so an id contains its style."""
    turns = row["turns"]
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        found = f"{len(turns)} turns" if isinstance(turns, list) else json_type(turns)
        raise RowError(
            f"field 'turns' must be a list of one text, this is {found}",
            "questions of several turns, such as those of MT-Bench, need the model's replies between them",
            code="invalid-row",
        )
    style, category = _optional(row, "prompt_style"), _optional(row, "category")
    id = _text(row, "question_id")
    return PublishedPrompt(
        turns[0], id if style in ("", "base") else f"{id}-{style}", (f"category {category}",) if category else ()
    )


def _text(row: Row, name: str) -> str:
    text = _optional(row, name)
    if not text.strip():
        raise RowError(f"column {name!r} is empty", "is the file complete?", code="invalid-row")
    return text


def _optional(row: Row, name: str) -> str:
    """The text of a column, or a whole number as text; empty where the row has none."""
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        hint = "is it the file that the authors published?"
        raise RowError(f"column {name!r} must be text, this is {json_type(value)}", hint, code="invalid-row")
    return "" if value is None else str(value)


# By the names that `cai eval bench` takes.
PUBLISHED: Mapping[str, PublishedSet] = {
    "harmbench": PublishedSet(
        "HarmBench",
        "harmbench_behaviors_text_all.csv",
        frozenset({"Behavior", "BehaviorID"}),
        frozenset({"Behavior", "BehaviorID", "ContextString", "FunctionalCategory", "SemanticCategory"}),
        _harmbench,
    ),
    "strongreject": PublishedSet(
        "StrongREJECT",
        "strongreject_dataset.csv",
        frozenset({"forbidden_prompt"}),
        frozenset({"forbidden_prompt", "category"}),
        _strongreject,
    ),
    "advbench": PublishedSet(
        "AdvBench", "harmful_behaviors.csv", frozenset({"goal", "target"}), frozenset({"goal"}), _advbench
    ),
    "sorrybench": PublishedSet(
        "SORRY-Bench",
        "question.jsonl",
        frozenset({"question_id", "turns"}),
        frozenset({"question_id", "turns", "category", "prompt_style"}),
        _sorrybench,
    ),
    "rewardbench": PublishedSet(
        "RewardBench",
        "filtered.parquet",
        frozenset({"prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"}),
        frozenset({"prompt", "chosen", "rejected", "subset"}),
    ),
}


def published_set(row: object) -> str | None:
    """The name of the published set whose columns a row has; None for another row.

    >>> published_set({"goal": "...", "target": "Sure, ..."}), published_set({"prompt": "..."})
    ('advbench', None)
    """
    if not isinstance(row, Mapping):
        return None
    return next((name for name, known in PUBLISHED.items() if known.marks <= row.keys()), None)
