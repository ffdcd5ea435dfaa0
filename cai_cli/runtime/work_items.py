"""Work items: what a data stage processes, one outcome each."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import orjson

T = TypeVar("T")


@dataclass(frozen=True)
class WorkItem(Generic[T]):
    """One unit of work.

    Attributes:
        key: Identifies the item; its outcome has the same key.
        line: The input line it comes from, counted from 1.
        value: The row or rows that the stage's `work` receives.
        hashed_id: Whether the key is a hash of the content. A second item with such a key is the same work and is
            skipped; a second item with an id from the input is an error.
    """

    key: str
    line: int
    value: T
    hashed_id: bool = False


@dataclass(frozen=True)
class Skipped:
    """An input row that needs no work, with the reason. It is counted and shown in the summary."""

    reason: str
    line: int


WorkItems = Iterator[WorkItem[T] | Skipped]


def item_digest(value: object) -> int:
    """32 bits of the hash of a work item's value, to detect that the content of a key has changed."""
    content = orjson.dumps(value, default=_as_json)
    return int.from_bytes(blake2b(content, digest_size=4).digest(), "little")


def _as_json(value: Any) -> Any:
    """A row, which is a pydantic model, as orjson takes it."""
    return value.model_dump(by_alias=True)
