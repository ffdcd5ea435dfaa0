"""The answers of the judge of `cai rl --judge`, kept in a file of the run, so that a resumed run asks nothing twice."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock

from cai_cli.common.files import write_atomically
from cai_cli.data.jsonl import AppendFile, cut_torn_tail, read_rows, rows_of
from cai_cli.data.reward_schema import JudgedReplies
from cai_cli.data.schema import dump_row

LogOddsPair = tuple[float, float]  # nats; in both phrasings, or in both orders of two replies


class AnswerCache:
    """The answers by criterion, prompt and replies.

    A batch that was not written as a whole is asked again as a whole: a model's log-probabilities may depend on the
    batch in the last digits, and a resumed run must get the same ones.

    Args:
        path: The file; None keeps the answers in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._known: dict[bytes, LogOddsPair] = {}
        self._file, self._lock = AppendFile(path) if path else None, Lock()
        if path and path.exists():
            cut_torn_tail(path)
            rows = [row for _, row in read_rows(str(path), rows_of(JudgedReplies))]
            whole = max((number for number, row in enumerate(rows, start=1) if row.ends_batch), default=0)
            if whole < len(rows):
                write_atomically(path, (dump_row(row) + b"\n" for row in rows[:whole]))
            for row in rows[:whole]:
                self._learn(row)

    def __len__(self) -> int:
        """The number of answers."""
        return len(self._known)

    def answer(self, criterion_id: str, prompt_hash: str, replies: Sequence[str]) -> LogOddsPair | None:
        """The log-odds that the judge gave, or None where it has not answered yet."""
        return self._known.get(_key(criterion_id, prompt_hash, replies))

    def add(self, rows: Sequence[JudgedReplies]) -> None:
        """Keep the answers of one batch. Raises CaiError where the file cannot be written."""
        with self._lock:
            if self._file:
                self._file.append(rows)
            for row in rows:
                self._learn(row)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _learn(self, row: JudgedReplies) -> None:
        for answer in row.answers:
            following, breaking = answer.log_odds
            self._known[_key(answer.criterion_id, row.prompt_hash, row.replies)] = (following, breaking)


def _key(criterion_id: str, prompt_hash: str, replies: Sequence[str]) -> bytes:
    digest = blake2b(digest_size=16)
    for part in (criterion_id, prompt_hash, *replies):
        digest.update(len(part).to_bytes(8) + part.encode(errors="surrogatepass"))
    return digest.digest()
