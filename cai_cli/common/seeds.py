"""Seeds for random draws."""

from hashlib import blake2b


def seed_for(*parts: str | int) -> int:
    """A 63-bit seed from what names one draw: (seed, stage, id, sample_index, round, ...).

    Randomness belongs to the row, so a result does not depend on batch size, neighbours or interruptions.
    """
    digest = blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
