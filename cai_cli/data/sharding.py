"""The shards of an input: which rows a run with `--shard I/N` processes."""

from dataclasses import dataclass
from hashlib import blake2b

from cai_cli.common.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of an input.

    The hash of a prompt's id alone decides its shard. So rows keep their shards when the input grows, and all rows of
    one prompt are in one shard.

    Attributes:
        index: From 1 to `count`.
        count: The number of shards.

    >>> [Shard(index, 3).contains("p1") for index in (1, 2, 3)].count(True)
    1
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that `--shard I/N` names.

        Raises:
            UsageError: `text` is not I/N with I from 1 to N.

        >>> Shard.parse("3/16")
        Shard(index=3, count=16)
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UsageError(
                f"--shard must be I/N with I from 1 to N, not {text!r}",
                hint="the third of 16: 3/16",
                code="invalid-option",
            )
        return cls(int(index), int(count))

    def contains(self, prompt_id: str) -> bool:
        """Whether the rows of this prompt are in this shard."""
        digest = blake2b(prompt_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index - 1
