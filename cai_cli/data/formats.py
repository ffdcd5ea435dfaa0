"""Reads prompts, labelled pairs and completions in every accepted format: transcripts, messages, HH-RLHF, TRL, `cai`.

The only module that detects row types: `row_type_of` names the type of a JSON object by its fields, and the
`parse_*` functions turn each accepted format into a row type of `schema`, so users need not convert their files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.evaluation_schema import EvaluationQuestion, EvaluationResult, HarmScore, ModelComparison
from cai_cli.data.schema import (
    Critique,
    JudgedPair,
    Kind,
    Message,
    Pair,
    PolicySample,
    Preference,
    Prompt,
    Rejected,
    Revision,
    Row,
    Sample,
    Scored,
    WorkItemRecord,
    conversation_id,
    json_type,
    load_row,
)
from cai_cli.data.transcripts import joined_turns, parse_transcript

TEXTS = ("prompt", "completion", "critique", "chosen", "rejected")
# Fields that mark a row type. The first type of which all marking fields are present is the type of the row.
_MARKS: Sequence[tuple[type[Row], frozenset[str]]] = (
    (Rejected, frozenset({"reason", "row"})),
    (WorkItemRecord, frozenset({"key", "digest"})),
    (ModelComparison, frozenset({"model_a", "model_b"})),
    (EvaluationQuestion, frozenset({"corrects", "incorrects"})),
    (EvaluationResult, frozenset({"askings"})),
    (JudgedPair, frozenset({"chosen_score", "rejected_score"})),
    (Critique, frozenset({"critique"})),
    (HarmScore, frozenset({"harm", "levels"})),
    (PolicySample, frozenset({"score", "monitor_score"})),
    (PolicySample, frozenset({"score", "watch_score"})),  # of version 0.1.0
    (Scored, frozenset({"score"})),
    (Revision, frozenset({"history"})),
    (Pair, frozenset({"a", "b"})),
    (Preference, frozenset({"chosen"})),
    (Preference, frozenset({"votes"})),
    (Sample, frozenset({"sample_index"})),
    (Sample, frozenset({"completion"})),
    (Prompt, frozenset({"prompt"})),
    (Prompt, frozenset({"messages"})),
)
# Rows made from a sample that are accepted where a prompt is.
_MADE_FROM_SAMPLES: Sequence[type[Sample]] = (Critique, Revision, Scored, PolicySample)

# Fields that a prompt row may have beside its prompt. Any other field is an error, so that nothing is ignored silently.
_PROMPT_FIELDS = frozenset({"id", "kind", "source"})


# --- row types ----------------------------------------------------------------------------------------------------


def row_type_of(value: object) -> type[Row] | None:
    """The row type that a JSON value is, or is read as, judged by its fields alone; None if no type has such fields.

    Rows of foreign formats have the type they are read as: `{"prompt", "completion"}` is a Sample, `{"messages"}` a
    Prompt, an HH-RLHF pair a Preference. The row is not validated.

    >>> row_type_of({"messages": [{"role": "user", "content": "Hello"}]}).__name__
    'Prompt'
    >>> row_type_of({"chosen": "...", "rejected": "..."}).__name__
    'Preference'
    """
    if not isinstance(value, dict):
        return None
    return next((row_type for row_type, marks in _MARKS if marks <= value.keys()), None)


def parse_row(value: object) -> Row:
    """A row that `cai` wrote, validated as the type that its fields show.

    Raises:
        RowError: The fields are those of no row type (`unknown-row-type`), or the row is not valid (`invalid-row`).
    """
    row_type = row_type_of(value)
    if row_type is None:
        raise RowError("not a row of any known type", code="unknown-row-type")
    return load_row(row_type, value)


def has_key(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object has what `row_key` needs."""
    return "key" in value or "id" in value


def row_key(value: Mapping[str, Any]) -> str:
    """The key of a row that `cai` wrote (see `Row.key`). The row is not validated.

    Raises:
        KeyError: The object has neither a key nor an id.

    >>> row_key({"id": "p1", "sample_index": 2, "completion": []})
    'p1/2'
    """
    if "key" in value:
        return str(value["key"])
    if "sample_index" in value and "model_a" not in value:  # the id of a ModelComparison already contains the index
        return f"{value['id']}/{value['sample_index']}"
    return str(value["id"])


# --- prompts ------------------------------------------------------------------------------------------------------


def parse_prompt(value: object, *, source: str, kind: Kind | None = None) -> Prompt:
    """A prompt from any accepted format.

    Args:
        value: Plain text (str); `{"prompt": text or [messages]}`; `{"messages": [...]}`; an HH-RLHF pair
            `{"chosen", "rejected"}` (every turn before the last assistant turn); or a row that a later stage wrote.
        source: The `source` of a row that has none.
        kind: The `kind` of a row that has none.

    Raises:
        RowError: The value has none of these formats, or an unknown field.

    >>> prompt = parse_prompt({"id": "p1", "prompt": "What is a prime?"}, source="prompts.jsonl")
    >>> prompt.id, prompt.prompt[0].content, prompt.source
    ('p1', 'What is a prime?', 'prompts.jsonl')
    """
    if isinstance(value, str):
        return _make_prompt([Message(role="user", content=value)], {}, source, kind)
    if not isinstance(value, dict):
        raise RowError(
            f"a prompt row must be a JSON object or plain text, this is {json_type(value)}", code="invalid-row"
        )
    if "prompt" in value and ("completion" in value or "votes" in value):
        return _prompt_of_later_row(value, source, kind)
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
            code="invalid-row",
        )
    unknown = sorted(set(value) - used - _PROMPT_FIELDS)
    if unknown:
        raise RowError(
            f"unknown field {unknown[0]!r} in a prompt row",
            hint=f"fields allowed beside the prompt: {sorted(_PROMPT_FIELDS)}",
            code="invalid-row",
        )
    return _make_prompt(messages, value, source, kind)


def _prompt_of_later_row(value: dict[str, Any], source: str, kind: Kind | None) -> Prompt:
    """The prompt of a row that a later stage wrote. The row must be valid."""
    row_type = row_type_of(value)
    row = load_row(Preference, value) if row_type is Preference else load_row(_sample_type(row_type), value)
    return _make_prompt(row.prompt, value, source, kind)


def _sample_type(row_type: type[Row] | None) -> type[Sample]:
    return next((known for known in _MADE_FROM_SAMPLES if known is row_type), Sample)


def _human_pair_prompt(value: dict[str, Any]) -> list[Message]:
    if "prompt" in value:  # TRL's preference format with an explicit prompt
        return _messages(value["prompt"], "prompt")
    return _conversation(value, "chosen")[:-1]


def _conversation(value: dict[str, Any], field: str) -> list[Message]:
    """`chosen` or `rejected` of an HH-RLHF row up to its last assistant turn, which is the reply."""
    if isinstance(value[field], list):
        messages = _messages(value[field], field)
    elif isinstance(value[field], str):
        messages = joined_turns(parse_transcript(value[field]))
    else:
        raise RowError(
            f"field {field!r} must be a transcript or messages, this is {json_type(value[field])}", code="invalid-row"
        )
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise RowError(f"field {field!r} holds no human turn followed by an assistant turn", code="invalid-row")
    return messages


def _messages(value: object, field: str) -> list[Message]:
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            turns = joined_turns(parse_transcript(value))
            return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns
        return [Message(role="user", content=value)]
    if not isinstance(value, list) or not value:
        raise RowError(
            f"field {field!r} must be text or a non-empty list of messages, this is {json_type(value)}",
            code="invalid-row",
        )
    return [load_row(Message, m) for m in value]


def _make_prompt(messages: list[Message], value: dict[str, Any], source: str, kind: Kind | None) -> Prompt:
    if not any(m.content.strip() for m in messages if m.role == "user"):
        raise RowError("the prompt is empty", code="invalid-row")
    given_id = value.get("id")
    if isinstance(given_id, int) and not isinstance(given_id, bool):
        given_id = str(given_id)
    fields = {
        "id": conversation_id(messages) if given_id is None else given_id,
        "prompt": [m.model_dump() for m in messages],
        "kind": kind if value.get("kind") is None else value["kind"],
        "source": source if value.get("source") is None else value["source"],
    }
    return load_row(Prompt, fields)


# --- pairs --------------------------------------------------------------------------------------------------------


def parse_preference(value: object, *, source: str) -> Preference:
    """A Preference: a row that `cai` wrote, or a pair that humans labelled.

    Args:
        value: A Preference row; an HH-RLHF pair, whose `chosen` and `rejected` are whole conversations (transcripts or
            messages); or TRL's preference format with an explicit `prompt`.
        source: The `source` of a row that has none.

    Returns:
        A row with `p_chosen` 1, no votes and `human` "chosen" for a pair that humans labelled. A pair without an id
        gets a hash of the prompt and both replies.

    Raises:
        RowError: The value has none of these formats, or its two replies answer different prompts.

    >>> pair = parse_preference({"prompt": "Hello", "chosen": "Hi!", "rejected": "Go away."}, source="pairs")
    >>> pair.chosen[0].content, pair.p_chosen, pair.human
    ('Hi!', 1.0, 'chosen')
    """
    if not isinstance(value, dict) or "votes" in value or "chosen" not in value or "rejected" not in value:
        return load_row(Preference, value)
    prompt = parse_prompt(value, source=source)
    replies: dict[str, list[dict[str, str]]] = {}
    for field in ("chosen", "rejected"):
        whole = "prompt" not in value
        if whole and _conversation(value, field)[:-1] != prompt.prompt:
            raise RowError("`chosen` and `rejected` answer different prompts", code="invalid-row")
        reply = _conversation(value, field)[-1:] if whole else _reply(value[field], field)
        replies[field] = [m.model_dump() for m in reply]
    # The id covers the replies too: humans may have compared several pairs of replies to one prompt.
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


# --- completions --------------------------------------------------------------------------------------------------


def completed_row(value: object) -> Sample:
    """A prompt with a completion: a Sample, a Revision, or a foreign `{"prompt", "completion"}`.

    Raises:
        RowError: The row has no completion, is a Critique (`wrong-row-type`), or is not valid.
    """
    row_type = row_type_of(value)
    if row_type is Critique:
        raise RowError(
            "a Critique row: its reply has not been revised yet",
            "`cai revise` turns critiques into revisions",
            code="wrong-row-type",
        )
    if isinstance(value, dict) and "sample_index" in value:
        return load_row(Revision if row_type is Revision else Sample, value)
    if not isinstance(value, dict) or "completion" not in value:
        raise RowError("no completion in this row", 'a row has "prompt" and "completion"', code="invalid-row")
    prompt = parse_prompt({k: v for k, v in value.items() if k != "completion"}, source="given")
    completion = value["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise RowError(
            f"field 'completion' must be text or messages, this is {json_type(completion)}", code="invalid-row"
        )
    fields = {"sample_index": 0, "completion": completion, "finish_reason": None}
    return load_row(Sample, prompt.model_dump() | fields)


def sample_or_revision(value: object) -> Sample:
    """A Sample or a Revision: a row whose reply can be criticised or judged.

    Raises:
        RowError: The row is a Critique (`wrong-row-type`), or is not valid.
    """
    row_type = row_type_of(value)
    if row_type is Critique:
        raise RowError(
            "a Critique row; this command takes Sample or Revision rows",
            "`cai revise` takes critiques",
            code="wrong-row-type",
        )
    return load_row(Revision if row_type is Revision else Sample, value)


def scorable(value: object, source: str) -> Sample | Preference:
    """A row that a preference model can score: one conversation, or a pair of two.

    Args:
        value: `{"messages"}` that end with the assistant's reply; a pair in any format of `parse_preference`; or a row
            in any format of `completed_row`, scored before or not.
        source: The `source` of a row that has none.

    Returns:
        The row. A row without an id gets the hash of its whole conversation.

    Raises:
        RowError: The value has none of these formats.
    """
    if not isinstance(value, dict):
        return completed_row(value)
    if "chosen" in value and "rejected" in value:
        return parse_preference(value, source=source)
    fields = {"source": source, **{k: v for k, v in value.items() if k not in ("messages", "score")}}
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise RowError("`messages` must be a list that ends with the assistant's reply", code="invalid-row")
        fields |= {"prompt": messages[:-1], "completion": messages[-1:]}
    row = completed_row(fields)
    return row if value.get("id") is not None else row.model_copy(update={"id": conversation_hash(row)})


def conversations(row: Sample | Preference) -> list[Sample]:
    """The conversations of a row: `chosen` (sample_index 0) and `rejected` (1) of a pair, else the row's only one."""
    if isinstance(row, Sample):
        return [Sample.model_validate(row.sample_fields())]
    shared = {"id": row.id, "prompt": row.prompt, "source": row.source}
    replies = ((row.chosen, row.chosen_finish_reason), (row.rejected, row.rejected_finish_reason))
    return [
        Sample.model_validate(shared | {"sample_index": i, "completion": reply, "finish_reason": reason})
        for i, (reply, reason) in enumerate(replies)
    ]


def conversation_hash(row: Sample | Preference) -> str:
    """The id for a row without one: the hash of its whole conversation, prompt and replies."""
    replies = row.completion if isinstance(row, Sample) else [*row.chosen, *row.rejected]
    return conversation_id([*row.prompt, *replies])


# --- any row ------------------------------------------------------------------------------------------------------


def row_object(value: object) -> dict[str, Any]:
    """A parsed JSON value that must be an object, as every row is.

    Raises:
        RowError: It is not an object.
    """
    if not isinstance(value, dict):
        raise RowError(f"a row must be a JSON object, this is {json_type(value)}", code="invalid-row")
    return value


def texts_of(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, text) of every text field of a row, which is not validated; the messages of a conversation are joined.

    >>> list(texts_of({"prompt": [{"role": "user", "content": "Hello"}], "critique": "None."}))
    [('prompt', 'Hello'), ('critique', 'None.')]
    """
    for field in TEXTS:
        content = value.get(field)
        if isinstance(content, list):
            content = "\n\n".join(str(message.get("content")) for message in content if isinstance(message, dict))
        if isinstance(content, str):
            yield field, content
