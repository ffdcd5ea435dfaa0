"""Statistics of a JSONL file (`cai stats`): counts, repeats, lengths and the distribution of p_chosen.

The file is read once, line by line. Memory: the counts, four bytes for each text of a row (for the quantiles), and a
table of hashes (for the repeats).
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import orjson

from cai_cli.common import console
from cai_cli.common.errors import InvalidRow
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.formats import row_object, texts_of
from cai_cli.data.jsonl import read_rows
from cai_cli.data.row_types import has_key, row_key, row_type_of
from cai_cli.data.schema import Rejected, reason_kind

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
COUNTED_FIELDS = ("kind", "source", "finish_reason", "human")
BINS = 10  # of p_chosen, which lies between 0.5 and 1
MAX_LINES = 12  # of one table on the terminal


class TextLength(Protocol):
    """Measures a text, in characters or tokens."""

    def __call__(self, text: str, /) -> int: ...


class Stats:
    """Collects the statistics of rows.

    Args:
        measure: Measures the texts of a row.

    Examples:
        >>> stats = Stats(len)
        >>> for line, id in enumerate(["a", "b", "a"], start=1):
        ...     stats.add(line, {"id": id, "prompt": "Hi", "kind": None})
        >>> result = stats.as_json()
        >>> result["rows"], result["repeated_keys"], result["by"]
        (3, 1, {'kind': {'null': 3}})
    """

    def __init__(self, measure: TextLength) -> None:
        self.measure = measure
        self.rows = 0
        self.invalid_lines = 0
        self.first_invalid: list[str] = []
        self.by: dict[str, Counter[str]] = {}
        self.lengths: dict[str, array[int]] = {}
        self.p_chosen = [0] * BINS
        self.keys, self.prompts = KeyTable(), KeyTable()
        self.repeated_keys = self.repeated_prompts = 0

    def add(self, line: int, value: Any) -> None:
        """Add the row on a line, counted from 1. A plain text only counts as a row."""
        self.rows += 1
        if not isinstance(value, dict):
            return
        self._count_fields(value)
        p_chosen = value.get("p_chosen")
        if isinstance(p_chosen, int | float) and 0.5 <= p_chosen <= 1:
            self.p_chosen[min(BINS - 1, int((p_chosen - 0.5) * 2 * BINS))] += 1
        for field, text in texts_of(value):
            self.lengths.setdefault(field, array("I")).append(self.measure(text))
            if field == "prompt" and self.prompts.add(text, line) is not None:
                self.repeated_prompts += 1
        if has_key(value) and self.keys.add(row_key(value), line) is not None:
            self.repeated_keys += 1

    def _count_fields(self, value: dict[str, Any]) -> None:
        for name in COUNTED_FIELDS:
            if name in value:
                self._count(name, value[name])
        if row_type_of(value) is Rejected:
            self._count("reason", reason_kind(str(value["reason"])))
        if isinstance(history := value.get("history"), list):
            self._count("rounds", len(history))
        for principle in _principles_of(value):
            self._count("principle_id", principle)

    def _count(self, name: str, value: object) -> None:
        self.by.setdefault(name, Counter())["null" if value is None else str(value)] += 1

    def skip(self, error: InvalidRow, _raw: bytes) -> None:
        """Count an invalid line; keep the messages of the first few."""
        self.invalid_lines += 1
        if len(self.first_invalid) < MAX_LINES:
            self.first_invalid.append(error.message)

    def as_json(self) -> dict[str, Any]:
        """Return the statistics as `--json` prints them; lengths are in the unit of `measure`."""
        width = 0.5 / BINS
        bins = [{"from": round(0.5 + i * width, 3), "rows": n} for i, n in enumerate(self.p_chosen)]
        return {
            "rows": self.rows,
            "bad_lines": self.invalid_lines,
            "first_bad_lines": self.first_invalid,
            "distinct_keys": self.keys.size,
            "repeated_keys": self.repeated_keys,
            "distinct_prompts": self.prompts.size,
            "repeated_prompts": self.repeated_prompts,
            "by": {name: dict(counter.most_common()) for name, counter in self.by.items()},
            "lengths": {field: _quantiles(lengths) for field, lengths in self.lengths.items()},
            "p_chosen": bins if any(self.p_chosen) else [],
        }


def _principles_of(value: dict[str, Any]) -> Iterator[str]:
    """Yield the principles behind a row: its own, those of earlier rounds, and those of the votes (each once)."""
    rounds = [value, *_objects(value.get("history"))]
    yield from (str(one["principle_id"]) for one in rounds if "principle_id" in one)
    yield from sorted({str(vote.get("principle_id")) for vote in _objects(value.get("votes"))})


def _objects(value: object) -> list[dict[str, Any]]:
    return [inner for inner in value if isinstance(inner, dict)] if isinstance(value, list) else []


def _quantiles(lengths: "array[int]") -> dict[str, float]:
    ordered, last = sorted(lengths), len(lengths) - 1
    named = {f"p{100 * q:g}": ordered[round(q * last)] for q in QUANTILES}
    return {"n": len(ordered), "mean": round(sum(ordered) / len(ordered), 1), **named}


def summary_lines(stats: dict[str, Any], unit: str) -> Iterator[str]:
    """Yield the statistics as lines of text.

    Args:
        stats: The result of `Stats.as_json`.
        unit: The unit of the lengths, such as "characters".
    """
    yield f"rows {stats['rows']:,}"
    if stats["bad_lines"]:
        yield f"invalid lines {stats['bad_lines']:,}; the first: {console.safe(stats['first_bad_lines'][0])}"
    for unique in ("keys", "prompts"):
        if stats[f"distinct_{unique}"]:
            yield f"{unique} {stats[f'distinct_{unique}']:,} distinct, {stats[f'repeated_{unique}']:,} repeated"
    for name, counts in stats["by"].items():
        yield f"\n{name}"
        for value, count in list(counts.items())[:MAX_LINES]:
            yield f"  {count:>12,}  {console.safe(value)}"
        if (more := len(counts) - MAX_LINES) > 0:
            yield f"  {'':>12}  and {more:,} more (--json lists all)"
    if stats["lengths"]:
        names = list(next(iter(stats["lengths"].values())))
        yield f"\nlength in {unit}\n  {'':<12}" + "".join(f"{name:>10}" for name in names)
        for field, lengths in stats["lengths"].items():
            yield f"  {field:<12}" + "".join(f"{lengths[name]:>10,}" for name in names)
    if stats["p_chosen"]:
        most = max(bin["rows"] for bin in stats["p_chosen"])
        yield "\np_chosen"
        for bin in stats["p_chosen"]:
            yield f"  {bin['from']:.2f} {bin['rows']:>12,}  {'#' * round(40 * bin['rows'] / most)}"


def _row(value: object) -> object:
    """Return a JSON object, or a prompt given as plain text."""
    return value if isinstance(value, str) else row_object(value)


def _token_counter(model: str) -> TextLength:
    from cai_cli.models.loading import load_tokenizer
    from cai_cli.models.names import resolve

    tokenizer = load_tokenizer(resolve(model))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def print_stats(input: str, tokenizer: str | None, *, as_json: bool) -> None:
    """Print the statistics of a JSONL file on stdout.

    Args:
        input: Path of the file, or `-` for stdin.
        tokenizer: Model whose tokens are counted instead of characters.
        as_json: Whether to print one JSON object.
    """
    stats = Stats(len if tokenizer is None else _token_counter(tokenizer))
    for line, value in read_rows(input, _row, stats.skip):
        stats.add(line, value)
    result = stats.as_json()
    unit = "characters" if tokenizer is None else f"tokens of {tokenizer}"
    if as_json:
        print(orjson.dumps({"file": input, "unit": unit, **result}).decode())
        return
    for text in summary_lines(result, unit):
        print(text)
