"""The shards of an input: which rows a `--shard I/N` run takes."""

from dataclasses import dataclass
from hashlib import blake2b

from cai_cli.common.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of an input, `index` from 1. A prompt's part is decided by the hash of its id alone, so the
    parts stay what they are when the input grows, and all rows of one prompt are in one part."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`I/N`. Raises UsageError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UsageError(f"--shard must be I/N with I from 1 to N, not {text!r}", hint="the third of 16: 3/16")
        return cls(int(index), int(count))

    def takes(self, prompt_id: str) -> bool:
        digest = blake2b(prompt_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index - 1
