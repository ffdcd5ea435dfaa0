"""The detector of foreign formats: tells by its fields what a JSON object is, and reads it as a conversation or a pair.

A format is one line of `SHAPES`. Columns that a format does not have are left out and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_cli.common.errors import RowError, UnusableRow
from cai_cli.data.dropped import Dropped
from cai_cli.data.foreign import batches
from cai_cli.data.foreign.published import PUBLISHED, PublishedSet
from cai_cli.data.foreign.turns import is_conversation, is_transcript, read_turns, with_system
from cai_cli.data.schema import Message, json_type
from cai_cli.data.transcripts import joined_turns, parse_transcript

Row = Mapping[str, Any]
IDS = ("id", "custom_id", "conversation_id")
SHARED = frozenset({*IDS, "kind", "source"})
PARTED = "chosen and rejected part before the last turn"


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        turns: Its turns; with `has_reply` the last one of the assistant is the reply.
        fields: `id`, `kind` and `source`, where the row has them.
        has_reply: Whether an assistant's last turn is a reply, not a part of the prompt.
        label: Whether the reply is a good one, for data sets that say so.
    """

    turns: list[Message]
    fields: dict[str, Any]
    has_reply: bool = True
    label: bool | None = None

    def prompt(self) -> list[Message]:
        """The turns before the reply; all turns where the last one is not the assistant's."""
        if self.turns and self.turns[-1].role == "assistant" and (self.has_reply or not self.turns[-1].content):
            return self.turns[:-1]
        return self.turns

    def completed(self) -> tuple[list[Message], Message]:
        """(the turns before the last one of the assistant, that turn).

        Raises:
            RowError: No turn of the assistant follows one of the user.
        """
        turns = _up_to_reply(self.turns)
        if not self.has_reply or len(turns) < 2:
            reason = ": no turn of the assistant follows one of the user" if self.has_reply else ""
            hint = 'a row has "prompt" and "completion", or a conversation'
            raise RowError(f"no completion in this row{reason}", hint, code="invalid-row")
        if self.label is False:
            raise UnusableRow("a reply that is labelled as a bad one")
        return turns[:-1], turns[-1]


@dataclass(frozen=True)
class ReplyPair:
    """Two conversations of which one is preferred, each ending with the assistant's reply.

    Attributes:
        chosen: The turns of the preferred conversation.
        rejected: The turns of the other one.
        fields: `id`, `kind` and `source`, where the row has them.
        columns: All columns of the row, for its scores.
    """

    chosen: list[Message]
    rejected: list[Message]
    fields: dict[str, Any]
    columns: Row = field(repr=False)

    def prompt(self) -> list[Message]:
        """The turns before the reply."""
        return self.chosen[:-1]

    def replies(self) -> tuple[Message, Message]:
        """The two replies, the chosen one first.

        Raises:
            UnusableRow: They answer different prompts.
        """
        if self.chosen[:-1] != self.rejected[:-1]:
            raise UnusableRow(PARTED)
        return self.chosen[-1], self.rejected[-1]


ATTACHMENTS = ("image", "images", "audio", "audios", "video", "videos")  # columns of what a message refers to
Found = Conversation | ReplyPair
Read = Callable[[Row, Dropped], tuple[Found, frozenset[str]]]


def recognize(value: object, dropped: Dropped, wanted: frozenset[str] = frozenset()) -> Found:
    """The conversation or the pair in a row of any format.

    Args:
        value: A JSON value: an object, or a list of messages.
        dropped: Counts the columns that are left out.
        wanted: Columns that the caller uses itself.

    Raises:
        RowError: The value has none of the formats, or is not valid in the one it has.
        UnusableRow: The row is valid, but not a conversation in text.
    """
    if is_conversation(value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise RowError(
            f"a prompt row must be a JSON object or plain text, this is {json_type(value)}", code="invalid-row"
        )
    shape = shape_of(value)
    if shape is None:
        raise _unreadable(value)
    if attached := next(
        (name for name in ATTACHMENTS if isinstance(value.get(name), str | list | dict) and value[name]), None
    ):
        raise UnusableRow(f"content that is not text: column {attached!r}")
    found, used = shape.read(value, dropped)
    if not isinstance(found.fields["source"], str | None):  # a column of another meaning
        found.fields["source"] = None
        dropped.add("source")
    for name, inner in value.items():
        if name not in used and name not in SHARED and name not in wanted and inner not in (None, "", [], {}):
            dropped.add(str(name))
    return found


@dataclass(frozen=True)
class Shape:
    """A format: its name, the fields that mark it, and the function that reads it."""

    name: str
    marks: frozenset[str]
    read: Read


def shape_of(value: Row) -> Shape | None:
    """The first format of which a row has all marking fields."""
    return next((shape for shape in SHAPES if shape.marks <= value.keys()), None)


def _fields(row: Row) -> dict[str, Any]:
    given = next((row[name] for name in IDS if row.get(name) is not None), None)
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    return {"id": given, "kind": row.get("kind"), "source": row.get("source")}


# --- conversations ------------------------------------------------------------------------------------------------


def _messages_in(column: str) -> Read:
    def read(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
        turns = read_turns(row[column], column, dropped)
        turns = with_system(row.get("system"), turns if column == "messages" else joined_turns(turns))
        # A prompt beside the messages repeats their first turn.
        used = {column, "system", *(("prompt",) if _repeats(row.get("prompt"), turns) else ())}
        return Conversation(turns, _fields(row)), frozenset(used)

    return read


def _repeats(prompt: object, turns: Sequence[Message]) -> bool:
    return isinstance(prompt, str) and any(prompt.strip() == turn.content.strip() for turn in turns)


def _prompt(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
    turns = with_system(row.get("system"), read_turns(row["prompt"], "prompt", dropped))
    return Conversation(turns, _fields(row), has_reply=False), frozenset({"prompt", "system"})


def _prompt_and(column: str) -> Read:
    """Prompt and reply, as text or messages, in the columns `prompt` and `column`."""

    def read(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
        prompt = Conversation(read_turns(row["prompt"], "prompt", dropped), {}, has_reply=False).prompt()
        reply = _reply(row[column], column, dropped)
        turns = with_system(row.get("system"), [*prompt, *reply])
        label = row.get("label") if isinstance(row.get("label"), bool) else None
        used = {"prompt", column, "system"} | ({"label"} if label is not None else set())
        return Conversation(turns, _fields(row), label=label), frozenset(used)

    return read


def _instruction(question: str, answer: str | None) -> Read:
    """An instruction with an optional input, and its answer, each as text."""

    def read(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
        parts = [_text(row, name) for name in (question, *CONTEXTS)]
        turns = [*_history(row.get("history")), Message(role="user", content="\n\n".join(filter(None, parts)))]
        if answer is not None:
            turns.append(Message(role="assistant", content=_text(row, answer)))
        used = frozenset({question, *CONTEXTS, *SYSTEMS, "history", *([answer] if answer else [])})
        system = next((row[name] for name in SYSTEMS if row.get(name)), None)
        return Conversation(with_system(system, turns), _fields(row), has_reply=answer is not None), used

    return read


CONTEXTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"field {name!r} must be text, this is {json_type(value)}", code="invalid-row")
    return value or ""


def _history(value: object) -> list[Message]:
    """Earlier turns as pairs of instruction and answer."""
    turns = []
    for pair in value if isinstance(value, list) else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("field 'history' must be a list of pairs of texts", code="invalid-row")
        turns += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return turns


def _reply(value: object, column: str, dropped: Dropped) -> list[Message]:
    if isinstance(value, str) and not is_transcript(value):
        return [Message(role="assistant", content=value)]
    return read_turns(value, column, dropped)


def _batch_request(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
    turns = batches.request_turns(row, dropped)
    return Conversation(turns, _fields(row), has_reply=False), batches.REQUEST_FIELDS


def _batch_result(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
    raise RowError(
        "a batch result, which does not hold its prompt",
        "`cai convert FILE --prompts REQUESTS -o OUT` joins both by custom_id",
        code="invalid-row",
    )


def _published(name: str, known: PublishedSet) -> Read:
    """A prompt of a published set, whose source is the set with the prompt's last category."""
    read_prompt = known.read
    if read_prompt is None:
        return _reward_bench

    def read(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
        found = read_prompt(row)
        fields = {"id": found.id, "kind": "red-team", "source": "/".join((name, *found.groups[-1:]))}
        return Conversation([Message(role="user", content=found.text)], fields, has_reply=False), known.columns

    return read


# --- pairs --------------------------------------------------------------------------------------------------------


def _reward_bench(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
    """A pair of RewardBench. Its prompt is text as it is, and its source names the subset."""
    prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    turns = [[Message(role="user", content=prompt), Message(role="assistant", content=r)] for r in (chosen, rejected)]
    fields = _fields(row) | {"source": f"rewardbench/{_text(row, 'subset')}"}
    return ReplyPair(turns[0], turns[1], fields, row), PUBLISHED["rewardbench"].columns


PROMPTS = ("prompt", "question", "instruction", "conversations", "messages")


def _pair(row: Row, dropped: Dropped) -> tuple[Found, frozenset[str]]:
    """A pair: two whole conversations, or two replies beside their prompt."""
    given = next((name for name in PROMPTS if row.get(name) is not None), None)
    sides = {name: _side(row[name], name, dropped) for name in ("chosen", "rejected")}
    used = {"chosen", "rejected", *SYSTEMS}
    prompt: list[Message] | None = None
    if given is not None and not (given == "messages" and all(map(_is_whole, sides.values()))):
        prompt = Conversation(read_turns(row[given], given, dropped), {}, has_reply=False).prompt()
        if given == "instruction" and (context := _text(row, "input")):
            prompt = [Message(role="user", content=f"{prompt[0].content}\n\n{context}")]
            used.add("input")
        used.add(given)
    system = next((row[name] for name in SYSTEMS if row.get(name)), None)
    whole = {name: with_system(system, _whole(turns, prompt, name)) for name, turns in sides.items()}
    return ReplyPair(whole["chosen"], whole["rejected"], _fields(row), row), frozenset(used)


def _side(value: object, name: str, dropped: Dropped) -> list[Message] | str:
    if not isinstance(value, str | list | dict):
        raise RowError(
            f"field {name!r} must be a transcript or messages, this is {json_type(value)}", code="invalid-row"
        )
    return value if isinstance(value, str) else read_turns(value, name, dropped)


def _is_whole(side: list[Message] | str) -> bool:
    return is_transcript(side) if isinstance(side, str) else side[0].role != "assistant"


def _whole(side: list[Message] | str, prompt: list[Message] | None, name: str) -> list[Message]:
    """The conversation of one side, from its first turn to its reply."""
    if isinstance(side, str) and prompt is None:
        turns = joined_turns(parse_transcript(side))
    elif isinstance(side, str):
        turns = [*(prompt or []), Message(role="assistant", content=side)]
    elif prompt is None:
        turns = side
    else:
        turns = _joined_to(prompt, side, name) if _is_whole(side) else [*prompt, *side]
    turns = _up_to_reply(turns)
    if len(turns) < 2:
        raise RowError(f"field {name!r} holds no human turn followed by an assistant turn", code="invalid-row")
    return turns


def _joined_to(prompt: list[Message], whole: list[Message], name: str) -> list[Message]:
    """A whole conversation that repeats the prompt, after the turns of the prompt that it lacks."""
    texts = [turn.content.strip() for turn in whole]
    if prompt == whole[: len(prompt)] or (len(prompt) == 1 and prompt[0].content.strip() in texts):
        return whole
    before = whole[: max(i for i, turn in enumerate(whole) if turn.role != "assistant") + 1]
    if len(before) < len(prompt) and prompt[-len(before) :] == before:  # a system message, most often
        return [*prompt, *whole[len(before) :]]
    raise UnusableRow("prompt is not in the conversation", f"`prompt` and `{name}` must belong together")


def _up_to_reply(turns: Sequence[Message]) -> list[Message]:
    """The turns up to the last one of the assistant."""
    kept = list(turns)
    while kept and kept[-1].role != "assistant":
        kept.pop()
    return kept


# --- the table ----------------------------------------------------------------------------------------------------

SHAPES: Sequence[Shape] = tuple(
    Shape(name, frozenset(marks), read)
    for name, marks, read in (
        *((known.title, known.marks, _published(name, known)) for name, known in PUBLISHED.items()),
        ("pair", ("chosen", "rejected"), _pair),
        ("OpenAI batch result", ("custom_id", "response"), _batch_result),
        ("Anthropic batch result", ("custom_id", "result"), _batch_result),
        ("OpenAI batch request", ("custom_id", "body"), _batch_request),
        ("Anthropic batch request", ("custom_id", "params"), _batch_request),
        ("messages", ("messages",), _messages_in("messages")),
        ("ShareGPT", ("conversations",), _messages_in("conversations")),
        ("LMSYS", ("conversation",), _messages_in("conversation")),
        ("prompt and completion", ("prompt", "completion"), _prompt_and("completion")),
        ("prompt and response", ("prompt", "response"), _prompt_and("response")),
        ("Alpaca", ("instruction", "output"), _instruction("instruction", "output")),
        ("Alpaca", ("instruction", "response"), _instruction("instruction", "response")),
        ("question and answer", ("question", "answer"), _instruction("question", "answer")),
        ("question and response", ("question", "response"), _instruction("question", "response")),
        ("prompt", ("prompt",), _prompt),
        ("instruction", ("instruction",), _instruction("instruction", None)),
    )
)
# Fields of formats that are not read -> their names.
_UNREADABLE: Sequence[tuple[str, frozenset[str], str]] = (
    ("a rejected row", frozenset({"reason", "row"}), "`jq -r .row FILE` prints the rows themselves"),
    ("an OpenAssistant tree", frozenset({"message_tree_id"}), "use a version of the set with whole conversations"),
    ("one of several scored completions", frozenset({"completions"}), "use a binarised version of the set"),
    ("a row of plain text", frozenset({"text"}), "`--column text` reads it as the prompt"),
)


def _unreadable(value: Row) -> RowError:
    """The error for a row without a known format, which names what it has."""
    if not value:
        return RowError("no prompt in this row", "docs/file_formats.md lists the formats", code="invalid-row")
    for name, marks, hint in _UNREADABLE:
        if marks <= value.keys():
            return RowError(f"no prompt in this row: it is {name}", hint, code="invalid-row")
    wrapped = [
        name for name, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)
    ]
    if len(wrapped) == 1:
        name = wrapped[0][:40]
        return RowError(
            f"no prompt in this row: it is an object with rows in {name!r}",
            f"`jq -c '.[\"{name}\"][]' FILE` prints the rows",
            code="invalid-row",
        )
    fields = ", ".join(str(name)[:40] for name in list(value)[:12])
    return RowError(
        f"no prompt in this row: its fields are {fields}",
        "--column NAME names the one that holds the prompt; docs/file_formats.md lists the formats",
        code="invalid-row",
    )
