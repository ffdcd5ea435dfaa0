"""Finds text that a model repeats because it is caught in a loop, in any script.

A loop is running prose that comes back word for word. Structure repeats too and is left alone: rows and separators of
tables, list items that differ in a number, refrains, code, matrices. So lines may repeat more often than sentences
inside a line, and text without words more often than text with words.

A model writes the text, and a hostile prompt may choose it, so time grows with the length of the text and not with its
square: no pattern here looks twice at a character that another attempt has passed.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Scripts that are written without spaces between words: each character is a token and counts as a part of a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"\s+|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d+|([^\w\s]|_)\1*|\S")
_UNSPACED_TOKEN = re.compile(f"[{_UNSPACED}]")
_SENTENCE_END = re.compile(r"(?<![.!?。!?।؟])[.!?。!?।؟]+[\"'”’」)]*(?=\s|$|[^\s.\d])")
_STRUCTURE = re.compile(r"\s*(?:[|>#*+\-•]|\d+[.)]|```)|[^|]*\|[^|]*\|")
_SAME_CHARACTER = re.compile(r"([^\s_=\-.])\1*")
SAME_CHARACTERS = 200  # of one character in a row, except those that draw lines

LONGEST_UNIT = 150  # tokens of the longest text whose repetition is looked for
PHRASE, SENTENCE = 3.0, 4.0  # words from which a unit counts as one
# Repetitions in a row that make a loop.
SENTENCES = 3  # of a sentence inside a line, or as a paragraph
PARAGRAPHS = 4  # of any other paragraph
LINES = 8  # of lines, word for word: a verse may repeat one
NUMBERED_LINES = 20  # of lines that differ in numbers only: plans of two weeks and tables of sums are shorter
WORDS = {1: 16, 2: 8, 3: 6}  # of one, two or three words: emphasis and "la la la" are shorter
SYMBOLS = 100  # of text without words, inside a line: rows of a matrix and leaders of a table of contents are shorter
# Repetitions that do not follow each other: text that comes back this often is a loop where it covers half the prose.
SCATTERED = 4
SCATTERED_WORDS = 6
PROSE_WORDS, PROSE_SENTENCES = 20, 2  # either makes a line running prose


def repeated_text(text: str) -> str | None:
    """The text that `text` repeats in a loop, shortened, or None.

    >>> repeated_text("Stop. I cannot help you with it. I cannot help you with it. I cannot help you with it.")
    'I cannot help you with it.'
    >>> repeated_text("- Day 1: walk for an hour and rest\\n- Day 2: walk for an hour and rest") is None
    True
    """
    if same := next((run for run in _SAME_CHARACTER.finditer(text) if len(run[0]) >= SAME_CHARACTERS), None):
        return _excerpt(same[1] * 3)
    tokens = [token for token in _TOKEN.finditer(text) if not _is_space(token[0])]
    exact = [_normalised(token[0]) for token in tokens]
    if found := _loop(exact, numbered=False):
        return _excerpt(text[tokens[found[0]].start() : tokens[found[1] - 1].end()])
    without_numbers = ["0" if token.isdigit() else token for token in exact]
    if without_numbers != exact and (found := _loop(without_numbers, numbered=True)):
        return _excerpt(text[tokens[found[0]].start() : tokens[found[1] - 1].end()])
    return _scattered(text)


def _is_space(token: str) -> bool:
    """Whether a token is white space inside a line."""
    return token.isspace() and "\n" not in token


def _normalised(token: str) -> str:
    return ("\n\n" if token.count("\n") > 1 else "\n") if "\n" in token else token.casefold()


def _loop(tokens: Sequence[str], *, numbered: bool) -> tuple[int, int] | None:
    """First and end position of a unit that is repeated as often as a loop, or None."""
    ids, fifths = _measured(tokens)
    for period in range(1, min(LONGEST_UNIT, len(tokens) // SENTENCES) + 1):
        for start, end in _stretches(ids, fifths, period):
            repetitions = (end - start + 1) / period  # a loop that ends in mid-unit may lack its last mark
            unit = tokens[start : start + period]
            if _is_periodic(unit):  # counted at its shortest period
                continue
            enough = _enough(unit, (fifths[start + period] - fifths[start]) / 5, numbered=numbered)
            if enough and repetitions >= enough:
                ends = (k for k in range(period) if _SENTENCE_END.match(unit[k]) or "\n" in unit[k])
                first = start + (next(ends, -1) + 1) % period  # named from the start of a sentence
                return first, first + period
    return None


def _measured(tokens: Sequence[str]) -> "tuple[NDArray[np.int32], NDArray[np.int64]]":
    """A number for each token, the same for equal ones, and the fifths of a word before each token and in all."""
    import numpy as np

    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], dtype=np.int32)
    weights = np.array([_fifths(token) for token in numbers], dtype=np.int64)
    return ids, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(weights[ids])])


def _is_periodic(unit: Sequence[str]) -> bool:
    """Whether a unit is itself the repetition of a shorter one."""
    return any(len(unit) % k == 0 and unit[k:] == unit[:-k] for k in range(1, len(unit) // 2 + 1))


def _stretches(ids: "NDArray[np.int32]", fifths: "NDArray[np.int64]", period: int) -> Iterator[tuple[int, int]]:
    """The stretches in which every token is the one `period` tokens before it, of at least three periods.

    A unit of few words has to come back more often than three times (`_enough`), so shorter stretches of it are left
    out.
    """
    import numpy as np

    same = ids[period:] == ids[:-period]
    if b"\x01" * (SENTENCES * period - period - 1) not in same.tobytes():
        return
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2] + period
    few_words = fifths[starts + period] - fifths[starts] < 5 * SENTENCE
    least = np.where(few_words, min(WORDS.values()), SENTENCES)
    for k in np.flatnonzero(ends - starts + 1 >= least * period):
        yield int(starts[k]), int(ends[k])


def _enough(unit: Sequence[str], words: float, *, numbered: bool) -> int | None:
    """How many repetitions of a unit make a loop; None where no number does."""
    lines, paragraphs = "\n" in unit, "\n\n" in unit
    if numbered:
        return NUMBERED_LINES if words >= PHRASE and (lines or paragraphs) else None
    if not words:
        return None if lines or paragraphs else SYMBOLS
    if words < SENTENCE:
        return WORDS[max(1, min(3, int(words)))] * (2 if lines or paragraphs else 1)
    if lines:
        return LINES
    return PARAGRAPHS if paragraphs and not any(map(_SENTENCE_END.match, unit)) else SENTENCES


def _fifths(token: str) -> int:
    """How many fifths of a word a token counts for. A single letter of a spaced script is a symbol, as in a matrix."""
    if len(token) > 1:
        return 5 if token[0].isalpha() else 0
    return 3 if _UNSPACED_TOKEN.match(token) else 0


def _scattered(text: str) -> str | None:
    """Text that comes back again and again in running prose, with other text between."""
    import numpy as np

    counted = [token for tokens in _prose(text) for token in tokens if _fifths(token)]
    ids, fifths = _measured(counted)
    # The shortest text of so many words, from each token on that has one.
    ends = np.searchsorted(fifths, fifths + 5 * SCATTERED_WORDS).tolist()
    runs = [(start, end) for start, end in enumerate(ends) if end <= len(counted)]
    packed, size = ids.tobytes(), ids.itemsize
    texts = [packed[size * start : size * end] for start, end in runs]
    counts = Counter(texts)
    covered = np.zeros(len(counted), dtype=bool)
    for (start, end), run in zip(runs, texts, strict=True):
        if counts[run] >= SCATTERED:
            covered[start:end] = True
    if 2 * covered.sum() <= len(counted) or not counts:
        return None
    (most, _), *_ = counts.most_common(1)
    start, end = runs[texts.index(most)]
    return _excerpt(("" if _UNSPACED_TOKEN.match(counted[start]) else " ").join(counted[start:end]))


def _prose(text: str) -> Iterator[list[str]]:
    """The tokens of the lines that are running prose: no code, no structure and no short lines, as of verse."""
    in_code = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not _STRUCTURE.match(line):
            sentences = len(_SENTENCE_END.findall(line.strip()))
            if sentences < PROSE_SENTENCES and len(line) < PROSE_WORDS:
                continue
            without_links = " ".join(part for part in line.split() if "://" not in part)
            tokens = [token[0].casefold() for token in _TOKEN.finditer(without_links)]
            if sentences >= PROSE_SENTENCES or sum(map(_fifths, tokens)) >= 5 * PROSE_WORDS:
                yield tokens


def _excerpt(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
