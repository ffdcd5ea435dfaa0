"""Finds near-duplicate texts: MinHash proposes candidates, and the overlap of their shingles decides.

Two texts are near-duplicates when the Jaccard similarity of their sets of character 5-grams (letters and digits, lower
case, single spaces) is at least a threshold. datasketch computes the signatures, which may miss pairs just above it.
"""

import re
from typing import Any

SHINGLE = 5  # characters
PERMUTATIONS = 128
BANDS, ROWS_PER_BAND = 32, 4  # a pair of similarity 0.5 is found with probability 0.87, of 0.6 with 0.99


def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of `text` without case, punctuation and repeated spaces; a shorter text is a single one."""
    plain = " ".join(re.findall(r"\w+", text.lower()))
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


class NearDuplicates:
    """An index of texts that finds near-duplicates of a new text. Memory: about 3 KiB a text.

    Args:
        threshold: The least Jaccard similarity of near-duplicates, from 0 to 1.
    """

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS_PER_BAND))
        self._texts: dict[str, str] = {}

    def add(self, name: str, text: str) -> None:
        """Add `text` under `name`, which must be new."""
        self._index.insert(name, _signature(shingles(text)))
        self._texts[name] = text

    def find(self, text: str) -> tuple[str, float] | None:
        """The most similar text of the index, as (name, Jaccard similarity); None if none reaches the threshold."""
        items = shingles(text)
        candidates = self._index.query(_signature(items))
        similarities = ((_jaccard(items, shingles(self._texts[name])), name) for name in candidates)
        similarity, name = max(similarities, default=(0.0, ""))
        return (name, similarity) if similarity >= self.threshold else None


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity of the character 5-grams of two texts, from 0 to 1.

    >>> similarity("Lock the door.", "lock the door!"), similarity("Lock the door.", "Say nothing.")
    (1.0, 0.0)
    """
    return _jaccard(shingles(one), shingles(other))


def _signature(items: frozenset[str]) -> Any:
    from datasketch import MinHash

    signature = MinHash(num_perm=PERMUTATIONS)
    signature.update_batch([item.encode() for item in items])
    return signature


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
