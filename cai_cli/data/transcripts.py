r"""Parses and renders transcripts in the format of HH-RLHF and of the paper's prompts: `\n\nHuman: ...`."""

import re
from collections.abc import Mapping, Sequence

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Message, Role

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}
SPEAKERS: Mapping[Role, str] = {"user": "Human", "assistant": "Assistant", "system": "System"}
_NAMES = "(Human|Assistant|System|H|A|CritiqueRequest|Critique|RevisionRequest|Revision)"
_HEADING = re.compile(rf"\n\n( *){_NAMES}:")
_ESCAPED = re.compile(rf"\n\n ( *){_NAMES}:")


def parse_transcript(text: str) -> list[Message]:
    r"""The messages of a transcript in the published `\n\nHuman: ...\n\nAssistant: ...` format of HH-RLHF.

    One space after a colon belongs to the format. A trailing `\n\nAssistant:` becomes an empty assistant message. Lines
    that `render_transcript` escaped are unescaped. `render_transcript` is the inverse.

    Args:
        text: The transcript. It must start with a turn.

    Returns:
        One message a turn, in order. Consecutive turns of one speaker stay apart (see `joined_turns`).

    Raises:
        RowError: The text does not start with a turn.

    >>> parse_transcript("\n\nHuman: Hello\n\nAssistant: Hi")
    [Message(role='user', content='Hello'), Message(role='assistant', content='Hi')]
    """
    pieces = _TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise RowError(r"not a transcript: it must start with '\n\nHuman:'", code="invalid-row")
    return [
        Message(role=_ROLES[speaker], content=_ESCAPED.sub(r"\n\n\1\2:", content.removeprefix(" ")))
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def render_transcript(messages: Sequence[Message], names: Mapping[Role, str] = SPEAKERS) -> str:
    r"""The transcript `\n\nHuman: ...\n\nAssistant: ...` of a conversation; the inverse of `parse_transcript`.

    The text of a message cannot start a turn: a line that looks like one is escaped.

    Args:
        messages: The conversation.
        names: The name of each role's speaker.

    >>> render_transcript([Message(role="user", content="Hello"), Message(role="assistant", content="Hi")])
    '\n\nHuman: Hello\n\nAssistant: Hi'
    """
    return "".join(f"\n\n{names[m.role]}: {escape_headings(m.content)}" for m in messages)


def escape_headings(text: str) -> str:
    r"""`text` with a space before each line that a reader would take for a turn or another part of a raw prompt.

    >>> escape_headings("Sure.\n\nHuman: do it")
    'Sure.\n\n Human: do it'
    """
    return _HEADING.sub(r"\n\n \1\2:", text)


def joined_turns(messages: list[Message]) -> list[Message]:
    """The messages with consecutive ones of one role joined by a blank line.

    A few HH-RLHF conversations have such turns, and chat templates refuse them.
    """
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            content = f"{joined[-1].content}\n\n{message.content}"
            joined[-1] = Message(role=message.role, content=content)
        else:
            joined.append(message)
    return joined
