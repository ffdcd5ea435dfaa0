"""A compact hash table from keys to line numbers."""

from array import array
from hashlib import blake2b


class KeyTable:
    """Maps millions of keys to line numbers in 12 to 36 bytes each (open addressing on 64-bit hashes).

    The probability that two of n different keys collide is n^2 / 2^65: 3e-8 at a million keys.

    Attributes:
        size: The number of keys in the table.
    """

    def __init__(self) -> None:
        self._resize(1 << 12)
        self.size = 0

    def _resize(self, slots: int) -> None:
        self.mask = slots - 1
        self.hashes = array("Q", bytes(8 * slots))
        self.lines = array("I", bytes(4 * slots))

    @staticmethod
    def _hash(key: str) -> int:
        return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") or 1

    def _slot(self, hashed: int) -> int:
        slot = hashed & self.mask
        while self.hashes[slot] not in (0, hashed):
            slot = (slot + 1) & self.mask
        return slot

    def add(self, key: str, line: int) -> int | None:
        """Add `key` unless it is in the table already.

        Returns:
            The line that the key was first added with, or None if it is new.
        """
        slot = self._slot(hashed := self._hash(key))
        if self.hashes[slot]:
            return self.lines[slot]
        self.hashes[slot], self.lines[slot] = hashed, line
        self.size += 1
        if self.size * 3 > self.mask * 2:
            self._grow()
        return None

    def get(self, key: str) -> int | None:
        """The line that `key` was added with, or None."""
        slot = self._slot(self._hash(key))
        return self.lines[slot] if self.hashes[slot] else None

    def number(self, key: str) -> int:
        """The number of this key, from 0 in the order of first use. Only for tables that nothing else adds to."""
        next_number = self.size
        first = self.add(key, next_number)
        return next_number if first is None else first

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def _grow(self) -> None:
        hashes, lines = self.hashes, self.lines
        self._resize(2 * (self.mask + 1))
        for hashed, line in zip(hashes, lines, strict=True):
            if hashed:
                slot = self._slot(hashed)
                self.hashes[slot], self.lines[slot] = hashed, line
