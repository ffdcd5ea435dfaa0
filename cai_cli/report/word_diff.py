"""What a revision changed, word by word."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

Kind = Literal["same", "del", "ins"]


class Piece(NamedTuple):
    """A run of text that stayed, went (`del`, only in the text before) or came (`ins`, only in the text after)."""

    kind: Kind
    text: str


class WordDiff(NamedTuple):
    """Both texts in pieces (joined, they are the texts) and the share of words that did not stay (0 to 1)."""

    before: list[Piece]
    after: list[Piece]
    changed: float


def compare_words(before: str, after: str) -> WordDiff:
    """A longest-common-subsequence difference over words; a change of white space alone is none."""
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
    """Words with the white space after them."""
    return re.findall(r"\S+\s*|\s+", text)


def _pieces(words: list[str], same: list[tuple[int, int]], other: Kind) -> Iterator[Piece]:
    at = 0
    for start, size in same:
        if start > at:
            yield Piece(other, "".join(words[at:start]))
        if size:
            yield Piece("same", "".join(words[start : start + size]))
        at = start + size
