"""Reads which of two replies a judge prefers from its answer in words.

Judges answer in many forms. An explicit answer decides where there is one, and otherwise a plain one:

- explicit: a JSON object, `{"reasoning": "...", "answer": "A"}`, also in a code fence; a marked letter, `[[A]]` or
  `\\boxed{A}`; a sentence that names the answer, "The answer is: (B)" or "I prefer Response A";
- plain: a line that is only a letter, "Response A"; a sentence that calls one reply better, "B is better than A".

An answer whose deciding forms name both letters is not a vote. So a judge that quotes `[[A]]` from a reply and then
prefers B gives no vote rather than a false one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from cai_cli.prompting.base import PromptFormat

_NOUN = r"(?:option|reply|response|answer|assistant|completion|candidate|choice)"
_LETTER = rf"(?:(?:the )?{_NOUN} )?\(?\b([AB])\b\)?"
_OPENING = (
    r"(?:(?:so|thus|hence|therefore|overall|finally|in conclusion|in summary),? )?"
    r"(?:i (?:think|believe|would say)(?: that)? )?"
)
_DEGREE = r"(?:(?:clearly|slightly|much|far|marginally|overall|significantly) )*(?:the )?"
_BETTER = (
    r"(?:better|best|preferable|preferred|superior|winner|right|correct|safer|safest|kinder|wiser"
    r"|less (?:harmful|toxic|offensive|dangerous|racist|sexist|biased|unethical|illegal|objectionable|misleading)"
    r"|more (?:harmless|helpful|honest|ethical|respectful|appropriate|thoughtful|truthful|accurate|considerate))"
)
_EXPLICIT = [
    rf"(?:the |my )?(?:(?:correct|final|best|better|right|preferred) )*"
    rf"(?:answer|verdict|judge?ment|decision|preference|winner|{_NOUN})(?: is:?| would be:?|:) ?{_LETTER}",
    rf"i(?: would|'d)? (?:prefer|choose|pick|select|go with) {_LETTER}(?: over .{{1,20}})?",
]
_PLAIN = [
    _LETTER,
    rf"{_LETTER} (?:is|was|would be) {_DEGREE}{_BETTER}(?: one| {_NOUN})?(?: than .{{1,20}})?",
    rf"{_LETTER} wins",
]
_MARKED = re.compile(r"\[\[\s*\(?([AB])\)?\s*\]\]|\\boxed\{\s*(?:\\text\{)?\s*\(?([AB])\)?\s*\}")
_OBJECT = re.compile(r"\{[^{}]*\}")
_KEYS = frozenset(
    {"answer", "final_answer", "verdict", "choice", "winner", "preference", "preferred", "better", "best", "decision"}
)
_SENTENCE_END = re.compile(r"\n|(?<=[.!?])\s")
_MARKUP = re.compile(r"[*_`#>\"“”‘’]")


def verdict_of(text: str, form: PromptFormat) -> str | None:
    """The letter of the reply that an answer prefers, or None where it names neither or both.

    Args:
        text: The judge's answer.
        form: With "raw" only the first line counts, because a base model continues with more questions and answers.

    Examples:
        >>> verdict_of("A is terse and rude. The answer is: (B)", "chat"), verdict_of("Both are fine", "chat")
        ('B', None)
    """
    if form == "raw":
        line = text.strip().partition("\n")[0]
        return _only([*_letters(line, _EXPLICIT), *_letters(line, _PLAIN[:1])])
    explicit = [*_in_json(text), *_marked(text), *_letters(text, _EXPLICIT)]
    return _only(explicit or _letters(text, _PLAIN))


def _only(letters: Iterable[str]) -> str | None:
    distinct = set(letters)
    return distinct.pop() if len(distinct) == 1 else None


def _marked(text: str) -> Iterator[str]:
    for match in _MARKED.finditer(text):
        yield match[1] or match[2]


def _in_json(text: str) -> Iterator[str]:
    for found in _OBJECT.finditer(text):
        try:
            value: dict[str, Any] = orjson.loads(found[0])
        except orjson.JSONDecodeError:
            continue
        for key, answer in value.items():
            if key.lower().replace(" ", "_") in _KEYS and isinstance(answer, str):
                yield from _letters(answer, [*_EXPLICIT, *_PLAIN])


def _letters(text: str, patterns: list[str]) -> Iterator[str]:
    """The letter of each sentence that is wholly one of the patterns."""
    for sentence in _SENTENCE_END.split(text):
        plain = " ".join(_MARKUP.sub("", sentence).split()).strip(" .!,;()-")
        for pattern in patterns:
            if match := re.fullmatch(_OPENING + pattern, plain, re.IGNORECASE):
                yield match[1].upper()
                break
