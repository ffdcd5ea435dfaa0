"""Which replies are compared with which: the pairs that `cai label-prefs` puts before its judge.

The paper (section 4.1) compares two samples of one prompt. Here a prompt may have more (`--pairs`), and pairs may also
come as they are: from HH-RLHF, whose human label is kept beside the model's, or from an earlier labelling.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from typing import Any

from cai_cli.common.errors import InvalidRow
from cai_cli.common.hash_index import KeyTable
from cai_cli.common.seeds import seed_for
from cai_cli.data.formats import parse_preference, row_type_of, sample_or_revision
from cai_cli.data.jsonl import Numbered, display_name, origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Pair, Preference, Sample, Scored, conversation_id, load_row
from cai_cli.runtime.stage_run import Skipped, WorkItem, WorkItems


def pair_units(reader: RowReader, source: str, pairing: str, seed: int, limit: int | None) -> WorkItems[Pair]:
    """The pairs of a file of samples (rows of one prompt must stand together, as `cai sample` writes them) or of pairs.

    Raises InvalidRow where they do not, or where one stands twice: pairs would be missing, or be no pairs.
    """
    rows: Iterator[Numbered[Any]]
    rows, prompts = reader.rows(source, lambda v: _row(v, origin(source), seed), limit), KeyTable()
    for prompt_id, group in groupby(rows, key=lambda numbered: _prompt_of(numbered[1])):
        if prompt_id is None:
            for line, pair in group:
                yield _unit(line, pair)
            continue
        samples = list(group)
        first = prompts.add(prompt_id, samples[0][0])
        if first is not None:
            reason = f"more replies to {prompt_id!r}, after those of line {first}"
            raise InvalidRow(display_name(source), samples[0][0], reason, "sort by id")
        _refuse_twice(samples, display_name(source))
        if len(samples) == 1:
            yield Skipped("only one reply to the prompt", samples[0][0])
        paired = list(_chosen_pairs(samples, pairing, seed, display_name(source)))
        for (line, one), (_, other) in paired:
            yield _unit(line, _pair(one, other))
        taken = {line for pair in paired for line, _ in pair}
        if paired:
            yield from (Skipped("no partner in a random pairing", line) for line, _ in samples if line not in taken)


def _prompt_of(row: Sample | Pair) -> str | None:
    """By which samples are grouped; None of a pair, which stands alone."""
    return row.id if isinstance(row, Sample) else None


def _row(value: object, source: str, seed: int) -> Sample | Pair:
    """A sample or a pair: a Pair row as a rejected file contains it, a Preference, or a pair that humans labelled."""
    row_type = row_type_of(value)
    if row_type is Pair:
        return load_row(Pair, value)
    if row_type is Scored:
        return load_row(Scored, value)
    if row_type is Preference:
        return _sides(parse_preference(value, source=source), seed)
    return sample_or_revision(value)


def _sides(row: Preference, seed: int) -> Pair:
    """A labelled pair without its label: the seed says which reply is `a`, else it always would be the better one."""
    swapped = bool(seed_for(seed, "sides", row.id) & 1)
    a, b = (row.rejected, row.chosen) if swapped else (row.chosen, row.rejected)
    human = None if row.human is None else "a" if (row.human == "chosen") != swapped else "b"
    fields = {"id": row.id, "prompt": row.prompt, "a": a, "b": b, "human": human, "source": row.source}
    return Pair.model_validate(fields)


def _unit(line: int, pair: Pair) -> WorkItem[Pair] | Skipped:
    if pair.a == pair.b:
        return Skipped("identical replies", line)
    hashes = (conversation_id([*pair.prompt, *replies]) for replies in ([*pair.a, *pair.b], [*pair.b, *pair.a]))
    return WorkItem(pair.id, line, pair, hashed_id=pair.id in hashes)


def _refuse_twice(samples: Sequence[Numbered[Sample]], name: str) -> None:
    lines: dict[str, int] = {}
    for line, sample in samples:
        if lines.setdefault(sample.key, line) != line:
            raise InvalidRow(name, line, f"{sample.key!r} stands on line {lines[sample.key]} already")


def _score(sample: Numbered[Sample], name: str) -> float:
    line, row = sample
    if not isinstance(row, Scored):
        hint = "`cai score` gives each reply the score of a preference model"
        raise InvalidRow(name, line, "no score, by which --pairs best-vs-rest knows the best reply", hint)
    return row.score


def _chosen_pairs(
    samples: Sequence[Numbered[Sample]], pairing: str, seed: int, name: str
) -> Iterator[tuple[Numbered[Sample], Numbered[Sample]]]:
    """All pairs; or a random pairing in which no reply stands twice (of an odd number one stays alone); or the reply of
    the highest score (the first of equal ones) with each other."""
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
    return Pair(id=name, prompt=one.prompt, a=one.completion, b=other.completion, human=None, source=one.source)
