"""Finds text that a model repeats because it is caught in a loop, in any script.

A loop is running prose that comes back word for word. Structure repeats too and is left alone: rows and separators of
tables, list items that differ in a number, refrains, code, matrices. So lines may repeat more often than sentences
inside a line, and text without words more often than text with words.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import eq

# Scripts that are written without spaces between words: each character is a token and counts as a part of a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[ \t]*\n\s*\n\s*|[ \t]*\n|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|\d+|([^\w\s]|_)\1*|\S")
_UNSPACED_TOKEN = re.compile(f"[{_UNSPACED}]")
_SENTENCE_END = re.compile(r"[.!?。!?।؟]+[\"'”’」)]*(?=\s|$|[^\s.\d])")
_STRUCTURE = re.compile(r"\s*(?:[|>#*+\-•]|\d+[.)]|```)|[^|]*\|[^|]*\|")
_CODE_BLOCK = re.compile(r"^\s*```.*?(?:^\s*```|\Z)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\S*://\S*")
_SAME_CHARACTER = re.compile(r"([^\s_=\-.])\1{199,}")

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
    if same := _SAME_CHARACTER.search(text):
        return _excerpt(same[1] * 3)
    tokens = list(_TOKEN.finditer(text))
    exact = [_normalised(token[0]) for token in tokens]
    if found := _loop(exact, numbered=False):
        return _excerpt(text[tokens[found[0]].start() : tokens[found[1] - 1].end()])
    without_numbers = ["0" if token.isdigit() else token for token in exact]
    if without_numbers != exact and (found := _loop(without_numbers, numbered=True)):
        return _excerpt(text[tokens[found[0]].start() : tokens[found[1] - 1].end()])
    return _scattered(text)


def _normalised(token: str) -> str:
    return ("\n\n" if token.count("\n") > 1 else "\n") if "\n" in token else token.casefold()


def _loop(tokens: Sequence[str], *, numbered: bool) -> tuple[int, int] | None:
    """First and end position of a unit that is repeated as often as a loop, or None."""
    words = [_words(token) for token in tokens]
    for period in range(1, min(LONGEST_UNIT, len(tokens) // SENTENCES) + 1):
        for start, end in _stretches(tokens, period):
            repetitions = (end - start + 1) / period  # a loop that ends in mid-unit may lack its last mark
            if repetitions < SENTENCES:
                continue
            unit = tokens[start : start + period]
            if _is_periodic(unit):  # counted at its shortest period
                continue
            enough = _enough(unit, sum(words[start : start + period]), numbered=numbered)
            if enough and repetitions >= enough:
                ends = (k for k in range(period) if _SENTENCE_END.match(unit[k]) or "\n" in unit[k])
                first = start + (next(ends, -1) + 1) % period  # named from the start of a sentence
                return first, first + period
    return None


def _is_periodic(unit: Sequence[str]) -> bool:
    """Whether a unit is itself the repetition of a shorter one."""
    return any(len(unit) % k == 0 and unit[k:] == unit[:-k] for k in range(1, len(unit) // 2 + 1))


def _stretches(tokens: Sequence[str], period: int) -> Iterator[tuple[int, int]]:
    """The stretches in which every token is the one `period` tokens before it, for about three periods or more."""
    same = bytes(map(eq, tokens, tokens[period:]))
    least = SENTENCES * period - period - 1
    if b"\x01" * least in same:
        yield from ((run.start(), run.end() + period) for run in re.finditer(b"\x01{%d,}" % least, same))


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


def _words(token: str) -> float:
    """How many words a token counts for. A single letter of a spaced script is a symbol, as in a matrix."""
    if _UNSPACED_TOKEN.match(token):
        return 0.6
    return float(len(token) > 1 and token[0].isalpha())


def _scattered(text: str) -> str | None:
    """Text that comes back again and again in running prose, with other text between."""
    tokens = list(chain.from_iterable(_prose(text)))
    counted = [(token, _words(token)) for token in tokens if _words(token)]
    runs: list[tuple[str, ...]] = []
    for start in range(len(counted)):
        size, end = 0.0, start
        while end < len(counted) and size < SCATTERED_WORDS:
            size += counted[end][1]
            end += 1
        if size >= SCATTERED_WORDS:
            runs.append(tuple(token for token, _ in counted[start:end]))
    counts = Counter(runs)
    covered = {i + k for i, run in enumerate(runs) if counts[run] >= SCATTERED for k in range(len(run))}
    if 2 * len(covered) <= len(counted) or not counts:
        return None
    (most, _), *_ = counts.most_common(1)
    return _excerpt(("" if _UNSPACED_TOKEN.match(most[0]) else " ").join(most))


def _prose(text: str) -> Iterator[list[str]]:
    """The tokens of the lines that are running prose: no code, no structure and no short lines, as of verse."""
    for line in _CODE_BLOCK.sub("", text).splitlines():
        tokens = [token[0].casefold() for token in _TOKEN.finditer(_LINK.sub(" ", line))]
        long = sum(map(_words, tokens)) >= PROSE_WORDS or len(_SENTENCE_END.findall(line.strip())) >= PROSE_SENTENCES
        if long and not _STRUCTURE.match(line):
            yield tokens


def _excerpt(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
