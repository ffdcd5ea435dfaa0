"""Chooses the replies to compare: the pairs that `cai label-prefs` gives to its judge (paper section 4.1).

The paper compares two samples of one prompt. Departure: a prompt may have more samples (`--pairs`), and the input may
contain pairs already: rows of HH-RLHF, whose human label is kept beside the model's, or an earlier labelling.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from typing import Any

from cai_cli.common.errors import InvalidRow
from cai_cli.common.hash_index import KeyTable
from cai_cli.common.seeds import seed_for
from cai_cli.data.dropped import Dropped
from cai_cli.data.formats import parse_preference, sample_or_revision
from cai_cli.data.jsonl import Numbered, display_name, origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.row_types import row_type_of
from cai_cli.data.schema import Pair, Preference, Sample, Scored, conversation_id, load_row
from cai_cli.data.splits import pair_problem
from cai_cli.runtime.stage_run import Skipped, WorkItem, WorkItems


def pair_items(reader: RowReader, source: str, pairing: str, seed: int, limit: int | None) -> WorkItems[Pair]:
    """Yield the pairs of a file of samples or of pairs.

    Args:
        reader: Reads the rows.
        source: Path of the file. The samples of one prompt must be consecutive, as `cai sample` writes them.
        pairing: How the replies to one prompt are paired, one of `PAIRINGS`.
        seed: Random seed; decides the sides of labelled pairs and the random pairing.
        limit: Largest number of rows to read, or None.

    Raises:
        InvalidRow: A row is not valid, the samples of a prompt are not consecutive, or a sample is repeated.
    """
    rows: Iterator[Numbered[Any]]
    rows, prompts = reader.rows(source, lambda v: _row(v, origin(source), seed, reader.dropped), limit), KeyTable()
    for prompt_id, group in groupby(rows, key=lambda numbered: _prompt_of(numbered[1])):
        if prompt_id is None:
            for line, pair in group:
                yield _work_item(line, pair)
            continue
        samples = list(group)
        first = prompts.add(prompt_id, samples[0][0])
        if first is not None:
            reason = f"replies to {prompt_id!r} are not consecutive: earlier ones start at line {first}"
            raise InvalidRow(
                display_name(source), samples[0][0], reason, "sort by id with `cai sort`", code="rows-out-of-order"
            )
        yield from _prompt_items(samples, pairing, seed, display_name(source))


def _prompt_items(samples: Sequence[Numbered[Sample]], pairing: str, seed: int, name: str) -> WorkItems[Pair]:
    """Yield the pairs of the samples of one prompt, and the samples that are in no pair."""
    _check_distinct(samples, name)
    if len(samples) == 1:
        yield Skipped("only one reply to the prompt", samples[0][0])
    paired = list(_paired(samples, pairing, seed, name))
    for (line, one), (_, other) in paired:
        yield _work_item(line, _pair(one, other))
    taken = {line for pair in paired for line, _ in pair}
    if paired:
        yield from (Skipped("no partner in a random pairing", line) for line, _ in samples if line not in taken)


def _prompt_of(row: Sample | Pair) -> str | None:
    """Return the prompt by which samples are grouped; None for a pair."""
    return row.id if isinstance(row, Sample) else None


def _row(value: object, source: str, seed: int, dropped: Dropped) -> Sample | Pair:
    """Return a sample, or a pair: from a file of rejected pairs, from a Preference row, or from a human label."""
    row_type = row_type_of(value)
    if row_type is Pair:
        return load_row(Pair, value)
    if row_type is Scored:
        return load_row(Scored, value)
    if row_type is Preference:
        return _sides(parse_preference(value, source=source, dropped=dropped), seed)
    return sample_or_revision(value)


def _sides(row: Preference, seed: int) -> Pair:
    """Return a labelled pair without its label; the seed decides which reply is `a`, which must not be a hint."""
    swapped = bool(seed_for(seed, "sides", row.id) & 1)
    replies = [(row.chosen, row.chosen_finish_reason), (row.rejected, row.rejected_finish_reason)]
    (a, a_ended), (b, b_ended) = reversed(replies) if swapped else replies
    human = None if row.human is None else "a" if (row.human == "chosen") != swapped else "b"
    fields = {"id": row.id, "prompt": row.prompt, "a": a, "b": b, "human": human, "source": row.source}
    return Pair.model_validate(fields | {"a_finish_reason": a_ended, "b_finish_reason": b_ended})


def _work_item(line: int, pair: Pair) -> WorkItem[Pair] | Skipped:
    if problem := pair_problem(pair.a, pair.b):
        return Skipped(problem, line)
    hashes = (conversation_id([*pair.prompt, *replies]) for replies in ([*pair.a, *pair.b], [*pair.b, *pair.a]))
    return WorkItem(pair.id, line, pair, hashed_id=pair.id in hashes)


def _check_distinct(samples: Sequence[Numbered[Sample]], name: str) -> None:
    lines: dict[str, int] = {}
    for line, sample in samples:
        if lines.setdefault(sample.key, line) != line:
            raise InvalidRow(name, line, f"{sample.key!r} repeats line {lines[sample.key]}", code="duplicate-id")


def _score(sample: Numbered[Sample], name: str) -> float:
    line, row = sample
    if not isinstance(row, Scored):
        hint = "`cai score` adds the score of a preference model"
        raise InvalidRow(name, line, "--pairs best-vs-rest needs a score for every reply", hint, code="invalid-row")
    return row.score


def _paired(
    samples: Sequence[Numbered[Sample]], pairing: str, seed: int, name: str
) -> Iterator[tuple[Numbered[Sample], Numbered[Sample]]]:
    """Yield the pairs of one prompt's samples.

    "all": every pair. "random": each sample in one pair; of an odd number one is left out. "best-vs-rest": the sample
    with the highest score, the first of equal ones, with every other.
    """
    if pairing == "all":
        yield from combinations(samples, 2)
        return
    if pairing == "best-vs-rest":
        scores = [_score(sample, name) for sample in samples]
        best = scores.index(max(scores))
        yield from ((samples[min(best, i)], samples[max(best, i)]) for i in range(len(samples)) if i != best)
        return
    rng = random.Random(seed_for(seed, "pairs", samples[0][1].id))  # noqa: S311
    order = rng.sample(range(len(samples)), len(samples) - len(samples) % 2)
    for first, second in zip(order[::2], order[1::2], strict=True):
        yield samples[min(first, second)], samples[max(first, second)]


def _pair(one: Sample, other: Sample) -> Pair:
    name = f"{one.id}/{one.sample_index}-{other.sample_index}"
    return Pair(
        id=name,
        prompt=one.prompt,
        a=one.completion,
        b=other.completion,
        human=None,
        source=one.source,
        a_finish_reason=one.finish_reason,
        b_finish_reason=other.finish_reason,
    )
