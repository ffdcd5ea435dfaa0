"""Reads prompts, labelled pairs and completions in every accepted format: transcripts, messages, HH-RLHF, TRL, `cai`.

The `parse_*` functions turn each accepted format into a row type of `schema`, so users need not convert their files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.dropped import Dropped
from cai_cli.data.foreign import scores
from cai_cli.data.foreign.shapes import IDS, Conversation, ReplyPair, recognize, shape_of
from cai_cli.data.foreign.turns import read_turns
from cai_cli.data.reward_schema import RubricPrompt
from cai_cli.data.row_types import row_type_of
from cai_cli.data.schema import (
    ContrastSample,
    Critique,
    Kind,
    Message,
    PolicySample,
    Preference,
    Prompt,
    Rejected,
    Revision,
    Row,
    Sample,
    Scored,
    conversation_id,
    json_type,
    load_row,
)

TEXTS = ("prompt", "completion", "critique", "chosen", "rejected")
_ENDS = ("chosen_finish_reason", "rejected_finish_reason")
_PROMPT_FIELDS = frozenset({"id", "prompt", "kind", "source"})
# Rows made from a sample that are accepted where a prompt is.
_MADE_FROM_SAMPLES: Sequence[type[Sample]] = (ContrastSample, Critique, Revision, Scored, PolicySample)


# --- prompts ------------------------------------------------------------------------------------------------------


def parse_prompt_with_rubric(
    value: object, *, source: str, kind: Kind | None = None, dropped: Dropped | None = None
) -> Prompt:
    """As `parse_prompt`; a RubricPrompt where the row has a `rubric`."""
    if not isinstance(value, dict) or value.get("rubric") is None:
        return parse_prompt(value, source=source, kind=kind, dropped=dropped)
    without = {name: inner for name, inner in value.items() if name != "rubric"}
    prompt = parse_prompt(without, source=source, kind=kind, dropped=dropped)
    return load_row(RubricPrompt, prompt.model_dump() | {"rubric": value["rubric"]})


def parse_prompt(value: object, *, source: str, kind: Kind | None = None, dropped: Dropped | None = None) -> Prompt:
    """A prompt from any accepted format.

    Args:
        value: Plain text (str); a row of any format of `foreign.shapes`, of which the last turn of the assistant is no
            part of the prompt; or a row that a later stage wrote.
        source: The `source` of a row that has none.
        kind: The `kind` of a row that has none.
        dropped: Counts the columns that are left out.

    Raises:
        RowError: The value has none of these formats.

    >>> prompt = parse_prompt({"id": "p1", "prompt": "What is a prime?"}, source="prompts.jsonl")
    >>> prompt.id, prompt.prompt[0].content, prompt.source
    ('p1', 'What is a prime?', 'prompts.jsonl')
    """
    if isinstance(value, str):
        return _make_prompt([Message(role="user", content=value)], {}, source, kind)
    if isinstance(value, dict) and "prompt" in value and value.keys() <= _PROMPT_FIELDS:  # most rows: not detected
        turns = read_turns(value["prompt"], "prompt", dropped or Dropped())
        return _make_prompt(Conversation(turns, value, has_reply=False).prompt(), value, source, kind)
    if isinstance(value, dict) and (row_type := _own_type(value)):
        if row_type is Preference or issubclass(row_type, Sample):
            return _make_prompt(_loaded(row_type, value).prompt, value, source, kind)
        raise RowError(f"a {row_type.__name__} row, which is not a prompt", code="invalid-row")
    found = recognize(value, dropped or Dropped())
    return _make_prompt(found.prompt(), found.fields, source, kind)


def _loaded(row_type: type[Row], value: Mapping[str, Any]) -> Sample | Preference:
    """A row of a later stage. It must be valid."""
    if row_type is Preference:
        return load_row(Preference, value)
    return load_row(next((known for known in _MADE_FROM_SAMPLES if known is row_type), Sample), value)


def _own_type(value: Mapping[str, Any]) -> type[Row] | None:
    """The type of a row that only `cai` writes; None for prompts, and for rows that other tools write too."""
    row_type = row_type_of(value)
    if row_type is None or row_type is Prompt or row_type is Rejected:
        return None
    if issubclass(row_type, Sample):
        return row_type if "sample_index" in value else None
    return None if row_type is Preference and "votes" not in value else row_type


def _make_prompt(messages: list[Message], fields: Mapping[str, Any], source: str, kind: Kind | None) -> Prompt:
    if not any(m.content.strip() for m in messages if m.role == "user"):
        raise RowError("the prompt is empty", code="invalid-row")
    given_id = fields.get("id")
    if isinstance(given_id, int) and not isinstance(given_id, bool):
        given_id = str(given_id)
    row = {
        "id": conversation_id(messages) if given_id is None else given_id,
        "prompt": [m.model_dump() for m in messages],
        "kind": kind if fields.get("kind") is None else fields["kind"],
        "source": source if fields.get("source") is None else fields["source"],
    }
    return load_row(Prompt, row)


# --- pairs --------------------------------------------------------------------------------------------------------


def parse_preference(
    value: object, *, source: str, soft_from: str | None = None, dropped: Dropped | None = None
) -> Preference:
    """A Preference: a row that `cai` wrote, or a pair that humans or a judge labelled.

    Args:
        value: A Preference row; or a pair in a format of `foreign.shapes`: two whole conversations, such as those of
            HH-RLHF, or two replies beside their prompt.
        source: The `source` of a row that has none.
        soft_from: The name of the two columns of scores from which the label is computed (`foreign.scores`).
        dropped: Counts the columns that are left out.

    Returns:
        A row with `p_chosen` 1, no votes and `human` "chosen" for a pair without scores. A pair without an id gets a
        hash of the prompt and both replies.

    Raises:
        RowError: The value has none of these formats.
        UnusableRow: Its two replies answer different prompts.

    >>> pair = parse_preference({"prompt": "Hello", "chosen": "Hi!", "rejected": "Go away."}, source="pairs")
    >>> pair.chosen[0].content, pair.p_chosen, pair.human
    ('Hi!', 1.0, 'chosen')
    """
    if not isinstance(value, dict) or "votes" in value or "chosen" not in value or "rejected" not in value:
        return load_row(Preference, value)
    columns = scores.columns_of(value, soft_from) if soft_from else {}
    found = recognize(value, dropped or Dropped(), frozenset({*columns.values(), "p_chosen", *_ENDS}))
    if not isinstance(found, ReplyPair):
        raise AssertionError("a row with `chosen` and `rejected` is a pair")
    chosen, rejected = found.replies()
    prompt = _make_prompt(found.prompt(), found.fields, source, None)
    # The id covers the replies too: humans may have compared several pairs of replies to one prompt.
    given_id = found.fields["id"]
    whole = conversation_id([*prompt.prompt, chosen, rejected]) if given_id is None else prompt.id
    p_chosen = scores.p_chosen(value, columns) if columns else value.get("p_chosen", 1.0)
    sides, human = [(chosen, value.get(_ENDS[0])), (rejected, value.get(_ENDS[1]))], "chosen"
    if isinstance(p_chosen, float) and p_chosen < 0.5:  # the scores prefer the other reply
        sides, human, p_chosen = sides[::-1], "rejected", 1 - p_chosen
    fields = {"id": whole, "prompt": [m.model_dump() for m in prompt.prompt], "p_chosen": p_chosen, "votes": []}
    for side, (reply, end) in zip(("chosen", "rejected"), sides, strict=True):
        fields |= {side: [reply.model_dump()], f"{side}_finish_reason": end}
    return load_row(Preference, fields | {"human": human, "source": prompt.source})


# --- completions --------------------------------------------------------------------------------------------------


def completed_row(value: object, *, source: str = "given", dropped: Dropped | None = None) -> Sample:
    """A prompt with a completion: a Sample, a Revision, or a conversation in a format of `foreign.shapes`, whose last
    turn of the assistant is the completion.

    Args:
        value: The row.
        source: The `source` of a row that has none.
        dropped: Counts the columns that are left out.

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
        return load_row(_with_reply(row_type), value)
    if not isinstance(value, dict | list):
        raise RowError("no completion in this row", 'a row has "prompt" and "completion"', code="invalid-row")
    found = recognize(value, dropped or Dropped(), frozenset({"finish_reason"}))
    if isinstance(found, ReplyPair):
        turns, reply = found.prompt(), found.replies()[0]
    else:
        turns, reply = found.completed()
    prompt = _make_prompt(turns, found.fields, source, None)
    reason = value.get("finish_reason") if isinstance(value, dict) else None
    fields = {"sample_index": 0, "completion": [reply.model_dump()], "finish_reason": reason}
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
    if isinstance(value, dict) and "sample_index" not in value and (shape := shape_of(value)):
        hint = "`cai convert FILE -o OUT` makes Sample rows of conversations"
        raise RowError(f"not a Sample row, but one of another format: {shape.name}", hint, code="invalid-row")
    return load_row(_with_reply(row_type), value)


def _with_reply(row_type: type[Row] | None) -> type[Sample]:
    """The type as which a row with a sample index is read where a prompt and its reply are needed."""
    return next((known for known in (ContrastSample, Revision) if known is row_type), Sample)


def scorable(value: object, source: str, dropped: Dropped | None = None) -> Sample | Preference:
    """A row that a preference model can score: one conversation, or a pair of two.

    Args:
        value: A pair in any format of `parse_preference`; or a row in any format of `completed_row`, scored before or
            not.
        source: The `source` of a row that has none.
        dropped: Counts the columns that are left out.

    Returns:
        The row. A row without an id gets the hash of its whole conversation.

    Raises:
        RowError: The value has none of these formats.
    """
    if not isinstance(value, dict):
        return completed_row(value, source=source, dropped=dropped)
    if "chosen" in value and "rejected" in value:
        return parse_preference(value, source=source, dropped=dropped)
    if "sample_index" in value:
        value = {k: v for k, v in value.items() if k != "score"}
    row = completed_row(value, source=source, dropped=dropped)
    if (
        "messages" in value
        and value["messages"]
        and read_turns(value["messages"], "messages", Dropped())[-1].role != "assistant"
    ):
        raise RowError("`messages` must end with the assistant's reply", code="invalid-row")
    given = any(value.get(name) is not None for name in IDS)
    return row if given else row.model_copy(update={"id": conversation_hash(row)})


def readable_type(value: object) -> type[Row]:
    """The row type that a JSON value of any format is read as: its own for a row of `cai`, else Preference for a pair,
    Sample for a conversation with a reply, and Prompt.

    Raises:
        RowError: The value has no format that is read.

    >>> readable_type({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    <class 'cai_cli.data.schema.Sample'>
    """
    if isinstance(value, str):
        return Prompt
    if isinstance(value, dict) and (own := _own_type(value) or (Rejected if row_type_of(value) is Rejected else None)):
        return own
    found = recognize(value, Dropped())
    if isinstance(found, ReplyPair):
        return Preference
    return Sample if found.has_reply and any(turn.role == "assistant" for turn in found.turns) else Prompt


def format_name(value: object) -> str:
    """The name of the format of a row that is read.

    >>> format_name({"conversations": []}), format_name("Hello"), format_name({"id": "a", "votes": []})
    ('ShareGPT', 'plain text', 'cai')
    """
    if isinstance(value, str):
        return "plain text"
    if not isinstance(value, dict):
        return "messages"
    own = "sample_index" in value or "votes" in value
    shape = None if own else shape_of(value)
    return shape.name if shape else "cai"


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
