"""What the detectors of wording (`reply_habits`, `refusals`) have in common: normalised text, and what a reply may say
before it comes to the point."""

import re

_QUOTES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "—": " - ", "–": "-"})
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_MARKUP = re.compile(r"[*_~#>|\"]+|^\s*[-+•]\s+", re.MULTILINE)
_SPACE = re.compile(r"\s+")
_APOLOGY = (
    r"(?:(?:i am|i'm|we are|we're) (?:\w+ ){0,2}(?:sorry|afraid)(?: to (?:hear|say)(?: that| this)?)?"
    r"(?: (?:that|if|for|about) [^.!?,]{1,80})?|(?:my |our )?(?:sincere )?apolog(?:ies|i[sz]e)[^.!?,]{0,60}|"
    r"i (?:must )?apologi[sz]e[^.!?,]{0,60}|sorry)"
)
_INTERJECTION = (
    r"(?:well|um+|uh+|hm+|ha(?:ha)+|oh(?: no| dear)?|ok(?:ay)?|yes|no(?! comment| one)|so|but|and|however|wow|hey|"
    r"sure|look|hi|hello|actually|honestly|unfortunately|regrettably|again|please(?! (?:don't|do not))|"
    r"interesting|instead)\b"
)
_AI = r"(?:\w+ ){0,3}(?:ai|assistant|language model|artificial intelligence|chatbot)\b"
# Possessive (`*+`): an interjection is never matched as anything else, so no text takes long.
FILLER = (
    rf"(?:(?:{_APOLOGY}|{_INTERJECTION}|thanks?(?: you)?(?: for [^.!?]{{1,60}})?|"
    r"i (?:understand|appreciate|reali[sz]e|know|see|hear) [^.!?;]{1,100}?(?=,? but\b|[,;])|"
    rf"as {_AI}[^,.]{{0,60}}|i(?:'m| am) (?:just |only )?{_AI}[^,.!?]{{0,40}}?(?= and\b| but\b|,|\.)|"
    r"i (?:think|guess|feel|believe))[,.!:;… -]*)*+"
)


def plain(text: str) -> str:
    """Return `text` in the form that the lexicons expect: lower case, straight quotes, no Markdown, single spaces.

    Examples:
        >>> plain("I’m **very** sorry.")
        "i'm very sorry."
    """
    return _SPACE.sub(" ", _MARKUP.sub("", _LINK.sub(r"\1", text.translate(_QUOTES)))).strip().lower()
