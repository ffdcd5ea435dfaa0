"""The forms in which prompts and labelled pairs come: transcripts, messages, HH-RLHF and TRL rows, our own rows.

All become rows of `records` here, without conversion beforehand.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.schema import (
    Critique,
    Kind,
    Message,
    PolicySample,
    Preference,
    Prompt,
    Revision,
    Role,
    Sample,
    Scored,
    conversation_id,
    json_type,
    load_row,
)

TEXTS = ("prompt", "completion", "critique", "chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}
SPEAKERS: Mapping[Role, str] = {"user": "Human", "assistant": "Assistant", "system": "System"}
_NAMES = "(Human|Assistant|System|H|A|CritiqueRequest|Critique|RevisionRequest|Revision)"
_HEADING = re.compile(rf"\n\n( *){_NAMES}:")
_ESCAPED = re.compile(rf"\n\n ( *){_NAMES}:")
# What a row may carry beside its prompt without our reading it; any other field is an error, not silently ignored.
_PROMPT_FIELDS = frozenset({"id", "kind", "source"})


def parse_transcript(text: str) -> list[Message]:
    """The published `\\n\\nHuman: ...\\n\\nAssistant: ...` form as messages; one space after the colon is its own.

    A trailing `\\n\\nAssistant:` (the cue to answer) is an empty assistant turn. Inverse: `render_transcript`.
    Raises RowError when the text does not start with a turn.
    """
    pieces = _TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise RowError(r"not a transcript: it must start with '\n\nHuman:'")
    return [
        Message(role=_ROLES[who], content=_ESCAPED.sub(r"\n\n\1\2:", said.removeprefix(" ")))
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def render_transcript(messages: Sequence[Message], names: Mapping[Role, str] = SPEAKERS) -> str:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...`; the inverse of `parse_transcript`. What a message says never becomes a
    turn of its own."""
    return "".join(f"\n\n{names[m.role]}: {escape_headings(m.content)}" for m in messages)


def escape_headings(text: str) -> str:
    """`text` with a space before each line that would be read as a turn or as another part of a raw prompt."""
    return _HEADING.sub(r"\n\n \1\2:", text)


def joined_turns(messages: list[Message]) -> list[Message]:
    """Consecutive turns of one speaker joined by a blank line: HH-RLHF holds a few, chat templates refuse them."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            content = f"{joined[-1].content}\n\n{message.content}"
            joined[-1] = Message(role=message.role, content=content)
        else:
            joined.append(message)
    return joined


def parse_prompt(value: object, *, source: str, kind: Kind | None = None) -> Prompt:
    """A prompt from any accepted form; `kind` and `source` fill what the row does not say.

    Accepted: plain text (str); {"prompt": "text" or [messages]}; {"messages": [...]}; HH-RLHF {"chosen", "rejected"}
    (every turn before the last assistant turn). Raises RowError.
    """
    if isinstance(value, str):
        return _make_prompt([Message(role="user", content=value)], {}, source, kind)
    if not isinstance(value, dict):
        raise RowError(f"a prompt row must be a JSON object or plain text, this is {json_type(value)}")
    if "prompt" in value and ("completion" in value or "votes" in value):
        return _own_row_as_prompt(value, source, kind)
    if "chosen" in value and "rejected" in value:
        messages, used = _human_pair_prompt(value), {"chosen", "rejected", "prompt"}
    elif "prompt" in value:
        messages, used = _messages(value["prompt"], "prompt"), {"prompt"}
    elif "messages" in value:
        messages, used = _messages(value["messages"], "messages"), {"messages"}
    else:
        raise RowError(
            "no prompt in this row",
            hint='a row has "prompt" (text or messages), "messages", or HH-RLHF "chosen" and "rejected"',
        )
    unknown = sorted(set(value) - used - _PROMPT_FIELDS)
    if unknown:
        raise RowError(
            f"unknown field {unknown[0]!r} in a prompt row", hint=f"known beside the prompt: {sorted(_PROMPT_FIELDS)}"
        )
    return _make_prompt(messages, value, source, kind)


def _own_row_as_prompt(value: dict[str, Any], source: str, kind: Kind | None) -> Prompt:
    """One of our own later rows (Sample, Critique, Revision, Preference, PolicySample): its prompt again."""
    row_type: type[Sample | Preference] = Preference
    if "score" in value:
        row_type = PolicySample if value.keys() & {"monitor_score", "watch_score"} else Scored
    elif "votes" not in value:
        row_type = Critique if "critique" in value else Revision if "history" in value else Sample
    row = load_row(row_type, value)
    return _make_prompt(row.prompt, value, source, kind)


def _human_pair_prompt(value: dict[str, Any]) -> list[Message]:
    if "prompt" in value:  # TRL's explicit-prompt preference form
        return _messages(value["prompt"], "prompt")
    return _conversation(value, "chosen")[:-1]


def _conversation(value: dict[str, Any], field: str) -> list[Message]:
    """`chosen` or `rejected` of an HH-RLHF row up to its last assistant turn, which is the reply."""
    if isinstance(value[field], list):
        messages = _messages(value[field], field)
    elif isinstance(value[field], str):
        messages = joined_turns(parse_transcript(value[field]))
    else:
        raise RowError(f"field {field!r} must be a transcript or messages, this is {json_type(value[field])}")
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise RowError(f"field {field!r} holds no human turn followed by an assistant turn")
    return messages


def parse_preference(value: object, *, source: str) -> Preference:
    """A Preference row, or a pair that humans labelled: HH-RLHF `chosen` and `rejected` (transcripts or messages), or
    TRL's with an explicit `prompt`. Raises RowError."""
    if not isinstance(value, dict) or "votes" in value or "chosen" not in value or "rejected" not in value:
        return load_row(Preference, value)
    prompt = parse_prompt(value, source=source)
    replies: dict[str, list[dict[str, str]]] = {}
    for field in ("chosen", "rejected"):
        whole = "prompt" not in value
        if whole and _conversation(value, field)[:-1] != prompt.prompt:
            raise RowError("`chosen` and `rejected` answer different prompts")
        reply = _conversation(value, field)[-1:] if whole else _reply(value[field], field)
        replies[field] = [m.model_dump() for m in reply]
    # Humans may have compared several pairs of replies to one prompt: the id is of the whole comparison.
    whole_pair = [*prompt.prompt, *(Message.model_validate(m[0]) for m in replies.values())]
    fields = {
        "id": conversation_id(whole_pair) if value.get("id") is None else prompt.id,
        "prompt": [m.model_dump() for m in prompt.prompt],
        "p_chosen": 1.0,
        "votes": [],
        "human": "chosen",
        "source": prompt.source,
    }
    return load_row(Preference, fields | replies)


def _reply(value: object, field: str) -> list[Message]:
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    return _messages(value, field)


def _messages(value: object, field: str) -> list[Message]:
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            turns = joined_turns(parse_transcript(value))
            return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns
        return [Message(role="user", content=value)]
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} must be text or a non-empty list of messages, this is {json_type(value)}")
    return [load_row(Message, m) for m in value]


def _make_prompt(messages: list[Message], value: dict[str, Any], source: str, kind: Kind | None) -> Prompt:
    if not any(m.content.strip() for m in messages if m.role == "user"):
        raise RowError("the prompt is empty")
    given = value.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    fields = {
        "id": conversation_id(messages) if given is None else given,
        "prompt": [m.model_dump() for m in messages],
        "kind": kind if value.get("kind") is None else value["kind"],
        "source": source if value.get("source") is None else value["source"],
    }
    return load_row(Prompt, fields)


def scorable(value: object, source: str) -> Sample | Preference:
    """A row with a conversation, or a pair of two.

    Accepted: {"messages"} that end with the assistant, any pair that `train-pm` takes, our rows with a completion, any
    {"prompt", "completion"}. A row without an id has the hash of its whole conversation. Raises RowError.
    """
    if not isinstance(value, dict):
        return completed_row(value)
    if "chosen" in value and "rejected" in value:
        return parse_preference(value, source=source)
    given = {"source": source, **{k: v for k, v in value.items() if k not in ("messages", "score")}}
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise RowError("`messages` must be a list that ends with the assistant's reply")
        given |= {"prompt": messages[:-1], "completion": messages[-1:]}
    row = completed_row(given)
    return row if value.get("id") is not None else row.model_copy(update={"id": conversation_hash(row)})


def conversations(row: Sample | Preference) -> list[Sample]:
    """The conversations of a row: of a pair `chosen` (sample_index 0) and `rejected` (1), otherwise one."""
    if isinstance(row, Sample):
        return [Sample.model_validate(row.sample_fields())]
    shared = {"id": row.id, "prompt": row.prompt, "source": row.source, "finish_reason": None}
    replies = enumerate((row.chosen, row.rejected))
    return [Sample.model_validate(shared | {"sample_index": i, "completion": reply}) for i, reply in replies]


def conversation_hash(row: Sample | Preference) -> str:
    replies = row.completion if isinstance(row, Sample) else [*row.chosen, *row.rejected]
    return conversation_id([*row.prompt, *replies])


def completed_row(value: object) -> Sample:
    """A row with a prompt and a completion: Sample, Revision, or any {"prompt", "completion"}. Raises RowError."""
    if isinstance(value, dict) and "critique" in value:
        raise RowError("a Critique row, whose reply is not revised yet", hint="`cai revise` makes revisions of it")
    if isinstance(value, dict) and "sample_index" in value:
        return load_row(Revision if "history" in value else Sample, value)
    if not isinstance(value, dict) or "completion" not in value:
        raise RowError("no completion in this row", hint='a row has "prompt" and "completion"')
    prompt = parse_prompt({k: v for k, v in value.items() if k != "completion"}, source="given")
    completion = value["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise RowError(f"field 'completion' must be text or messages, this is {json_type(completion)}")
    fields = {"sample_index": 0, "completion": completion, "finish_reason": None}
    return load_row(Sample, prompt.model_dump() | fields)


def sample_or_revision(value: object) -> Sample:
    """A row whose reply can be criticised. Raises RowError."""
    if isinstance(value, dict) and "critique" in value:
        raise RowError("a Critique row, where a Sample or Revision is wanted", hint="`cai revise` takes critiques")
    return load_row(Revision if isinstance(value, dict) and "history" in value else Sample, value)


def row_object(value: object) -> dict[str, Any]:
    """Any row is an object. Raises RowError, as the stages do."""
    if not isinstance(value, dict):
        raise RowError(f"a row must be a JSON object, this is {json_type(value)}")
    return value


def texts_of(value: Any) -> Iterator[tuple[str, str]]:
    """(field, text) of what was said in a row; several messages are one text."""
    for field in TEXTS:
        said = value.get(field)
        if isinstance(said, list):
            said = "\n\n".join(str(message.get("content")) for message in [m for m in said if isinstance(m, dict)])
        if isinstance(said, str):
            yield field, said
