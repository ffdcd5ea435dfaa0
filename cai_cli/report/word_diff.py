"""Differences between two texts, word by word."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

Kind = Literal["same", "del", "ins"]


class Piece(NamedTuple):
    """A piece of text that both texts share, or that is only in the text before (`del`) or after (`ins`)."""

    kind: Kind
    text: str


class WordDiff(NamedTuple):
    """Both texts in pieces, which join to the texts, and the share of words that changed (0 to 1)."""

    before: list[Piece]
    after: list[Piece]
    changed: float


def compare_words(before: str, after: str) -> WordDiff:
    """Return the difference of two texts by their longest common subsequence of words; white space does not count.

    Examples:
        >>> difference = compare_words("I will not help.", "I will gladly help.")
        >>> [piece.text for piece in difference.after if piece.kind == "ins"], difference.changed
        (['gladly '], 0.25)
    """
    old, new = _words(before), _words(after)
    matcher = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    blocks = matcher.get_matching_blocks()
    kept = sum(block.size for block in blocks)
    total = len(old) + len(new)
    return WordDiff(
        list(_pieces(old, [(b.a, b.size) for b in blocks], "del")),
        list(_pieces(new, [(b.b, b.size) for b in blocks], "ins")),
        1 - 2 * kept / total if total else 0.0,
    )


def _words(text: str) -> list[str]:
    """Return the words, each with the white space after it."""
    return re.findall(r"\S+\s*|\s+", text)


def _pieces(words: list[str], same: list[tuple[int, int]], other: Kind) -> Iterator[Piece]:
    at = 0
    for start, size in same:
        if start > at:
            yield Piece(other, "".join(words[at:start]))
        if size:
            yield Piece("same", "".join(words[start : start + size]))
        at = start + size
