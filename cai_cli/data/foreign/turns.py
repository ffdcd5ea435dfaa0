"""Reads lists of messages as other tools spell them: other names of roles, content in parts, names, tool turns."""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.dropped import Dropped
from cai_cli.data.schema import Message, Role, json_type, load_row
from cai_cli.data.transcripts import joined_turns, parse_transcript

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = frozenset(
    {"tool", "tools", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}
)
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
PART_SEPARATOR = "\n\n"
TOOL_TURN = "a tool call or its result, which is not part of a conversation in text"


def read_turns(value: object, field: str, dropped: Dropped) -> list[Message]:
    """The turns in `value`: text of one user turn, a transcript, one message, or a list of messages.

    Args:
        value: The value of the field.
        field: Its name, for messages.
        dropped: Counts what is left out of the messages.

    Raises:
        RowError: The value is none of these.
        UnusableRow: A turn holds something other than text.
    """
    if isinstance(value, str):
        return joined_turns(parse_transcript(value)) if is_transcript(value) else [Message(role="user", content=value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        given = "an empty list" if value == [] else json_type(value)
        raise RowError(
            f"field {field!r} must be text or a non-empty list of messages, this is {given}",
            code="invalid-row",
        )
    return [_message(each, field, dropped) for each in value]


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript of HH-RLHF."""
    return text.startswith("\n\nHuman:")


def is_conversation(value: object) -> bool:
    """Whether a JSON value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and _key(each, ROLE_KEYS) and _key(each, CONTENT_KEYS) for each in value)
    )


def with_system(system: object, turns: Sequence[Message]) -> list[Message]:
    """The turns after a system message from a column of its own, unless they have one themselves."""
    if not isinstance(system, str) or not system.strip() or (turns and turns[0].role == "system"):
        return list(turns)
    return [Message(role="system", content=system), *turns]


def _message(value: object, field: str, dropped: Dropped) -> Message:
    if not isinstance(value, dict):
        return load_row(Message, value)
    if len(value) == 2 and type(value.get("content")) is str and value.get("role") in ("user", "assistant", "system"):
        return Message(role=value["role"], content=value["content"])
    role_key, content_key = _key(value, ROLE_KEYS), _key(value, CONTENT_KEYS)
    if role_key is None:
        raise RowError(f"a message in field {field!r} has no role", code="invalid-row")
    given = value[role_key]
    if (isinstance(given, str) and given.lower() in TOOL_ROLES) or any(value.get(call) for call in CALLS):
        raise UnusableRow(TOOL_TURN)
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RowError(
            f"field 'role' of a message in {field!r}: {given!r:.40} is not a role",
            hint=f"known roles: {', '.join(ROLES)}",
            code="invalid-row",
        )
    for key, inner in value.items():
        if key not in (role_key, content_key) and inner not in (None, "", [], {}):
            dropped.add(f"{field}[].{key}")
    return Message(role=role, content=text_of(value.get(content_key) if content_key else None, field, dropped))


def _key(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in value), None)


def text_of(content: object, field: str, dropped: Dropped) -> str:
    """The text of a message's content: text, or parts of which the texts are joined and the thoughts left out.

    Raises:
        RowError: The content is neither.
        UnusableRow: A part is an image or another thing that is not text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RowError(
            f"the content of a message in field {field!r} must be text or parts, this is {json_type(content)}",
            code="invalid-row",
        )
    texts = [text for part in content if (text := _part(part, field, dropped)) is not None]
    return PART_SEPARATOR.join(texts)


def _part(part: object, field: str, dropped: Dropped) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise RowError(f"a content part in field {field!r} must be text or an object with a type", code="invalid-row")
    if kind in THOUGHT_PARTS:
        dropped.add(f"{field}[].content: {kind}")
        return None
    if kind in ("tool_use", "tool_result", "server_tool_use", "tool_call"):
        raise UnusableRow(TOOL_TURN)
    if kind not in TEXT_PARTS:
        raise UnusableRow(f"content that is not text: {kind:.40}")
    if not isinstance(text := part.get("text"), str):
        raise RowError(f"a text part in field {field!r} has no text, this is {json_type(text)}", code="invalid-row")
    return text
