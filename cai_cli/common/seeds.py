"""Seeds for random draws."""

from hashlib import blake2b


def seed_for(*parts: str | int) -> int:
    """A 63-bit seed for one random draw, hashed from what identifies it: (seed, stage, id, sample_index, round, ...).

    Each row's randomness derives from its own id, so a result does not depend on the batch size, on other rows or on
    interruptions.

    >>> seed_for(0, "sample", "p1", 0) == seed_for(0, "sample", "p1", 0) != seed_for(0, "sample", "p2", 0)
    True
    """
    digest = blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
