"""Sets the thoughts of a reasoning model apart from its reply. No other module knows how thoughts are written.

Models write them before the reply: between tags (`<think>`, Mistral's `[THINK]`, Gemma's `<|channel>thought`), or in
channels with headers (Harmony: `<|channel|>analysis<|message|>`). Some chat templates open the thoughts themselves, in
the generation prompt, so that the answer holds only their end.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.engines.base import Completion, RequestFailure

# What opens thoughts -> what closes them.
TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]", "<|channel>thought": "<channel|>"}
# The control tokens of channels.
_CHANNEL, _MESSAGE, _END, _START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
# Strings that must survive decoding even where they are special tokens.
MARKERS = frozenset({*TAGS, *TAGS.values(), "<|channel>", _CHANNEL, _MESSAGE, _END, _START, "<|return|>", "<|call|>"})
NEVER_LEFT = "the reply never left its thoughts"

_IN_CHANNELS = re.compile(r"\s*(<\|start\|>)?(assistant)?\s*<\|channel\|>")
_CHANNELS = re.compile(r"<\|channel\|>(.*?)<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL)
# Channels of a server that dropped their control tokens.
_BARE_CHANNELS = re.compile(r"analysis(?=[^\sa-z])(.*?)(?:assistantfinal(.*))?\Z", re.DOTALL)


def separate(text: str, opened: str = "") -> tuple[str | None, str | None]:
    """The thoughts in a generated text, and its reply without them.

    Args:
        text: The generated text, with the markers of `MARKERS`.
        opened: The opening of thoughts at the end of the generation prompt (`unclosed`), which `text` continues.

    Returns:
        The thoughts, None where there are none; and the reply, None where the text ends within its thoughts.

    >>> separate("<think>A fruit.</think>A pear.")
    ('A fruit.', 'A pear.')
    >>> separate("A fruit.</think>A pear.", opened="<think>")
    ('A fruit.', 'A pear.')
    >>> separate("<think>A fruit")
    ('A fruit', None)
    >>> separate("A pear.")
    (None, 'A pear.')
    """
    whole = opened + text
    if _IN_CHANNELS.match(whole):
        bodies = [(header.split()[:1], body) for header, body in _CHANNELS.findall(whole)]
        replies = [body for channel, body in bodies if channel == ["final"]]
        thoughts = [body for channel, body in bodies if channel != ["final"]]
        return _joined(thoughts), "".join(replies) if replies else None
    if bare := _BARE_CHANNELS.match(whole):
        return _joined([bare[1]]), bare[2]
    return _separate_tags(whole)


def _separate_tags(text: str) -> tuple[str | None, str | None]:
    thoughts: list[str] = []
    reply = text
    while opening := next((tag for tag in TAGS if reply.lstrip().startswith(tag)), None):
        rest = reply.lstrip().removeprefix(opening).lstrip().removeprefix(opening)  # some models open them again
        inner, closing, reply = rest.partition(TAGS[opening])
        thoughts.append(inner)
        if not closing:
            return _joined(thoughts), None
    if not thoughts:  # a server whose template opens the thoughts returns only their end
        for opening, closing in TAGS.items():
            before, closed, after = reply.partition(closing)
            if closed and opening not in before:
                return _joined([before]), after.lstrip()
    return _joined(thoughts), reply.lstrip() if thoughts else reply


def _joined(thoughts: list[str]) -> str | None:
    return "\n\n".join(stripped for part in thoughts if (stripped := part.strip())) or None


def without_thoughts(completion: Completion, opened: str = "") -> Completion | RequestFailure:
    """The completion with its thoughts apart from its text; a RequestFailure where it never left them.

    Args:
        completion: What the model generated. Thoughts that a server sent apart stay.
        opened: As in `separate`.
    """
    thoughts, reply = separate(completion.text, opened)
    if reply is None:
        return RequestFailure(never_left(completion.finish_reason))
    return replace(completion, text=reply, thoughts=thoughts or completion.thoughts)


def never_left(finish_reason: str) -> str:
    """Why a reply that is nothing but thoughts is rejected."""
    end = "cut off at the token limit" if finish_reason == CUT_OFF else "it ended within them"
    return f"{NEVER_LEFT}: {end}; raise --max-new-tokens, or use --thinking off"


def reply_of(text: str, opened: str = "") -> str:
    """The reply in a generated text; empty where it never left its thoughts."""
    return separate(text, opened)[1] or ""


def unclosed(prompt: str) -> str:
    """The opening of thoughts that a generation prompt leaves open, with the white space after it; empty without one.

    >>> unclosed("<|assistant|><think>\\n"), unclosed("<|assistant|><think>\\n</think>")
    ('<think>\\n', '')
    """
    for opening, closing in TAGS.items():
        start = prompt.rfind(opening)
        if start > prompt.rfind(closing):
            return prompt[start:]
    start = prompt.rfind(f"{_CHANNEL}analysis{_MESSAGE}")
    return "" if start < 0 or _END in prompt[start:] else prompt[start:]


def closing_of(opened: str) -> str:
    """What ends the thoughts after `opened` (`unclosed`) and begins the reply; empty where none are open.

    >>> closing_of("<think>\\n")
    '\\n</think>\\n\\n'
    """
    if not opened:
        return ""
    opening = next((tag for tag in TAGS if opened.startswith(tag)), None)
    if opening is None:
        return f"{_END}{_START}assistant{_CHANNEL}final{_MESSAGE}"
    return f"\n{TAGS[opening]}\n\n" if opening == "<think>" else TAGS[opening]


def form_in(template: str, tokens: Collection[str]) -> str | None:
    """How a model writes its thoughts, as its chat template and its added tokens show; None where they show none."""
    if _CHANNEL in template:
        return f"{_CHANNEL}analysis"
    return next((tag for tag, closing in TAGS.items() if closing in template or closing in tokens), None)
