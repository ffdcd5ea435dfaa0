"""Every JSONL row type, in the order of the road, and the prompt formats accepted without conversion.

Shapes follow TRL's conversational dataset formats, so `datasets.load_dataset("json", data_files=...)` and any TRL
trainer read every file as it is. Every field is always present, with one type (null allowed where said).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cai_cli.errors import RowError

Role = Literal["system", "user", "assistant"]
Kind = Literal["red-team", "helpful"]


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @property
    def key(self) -> str:
        """What makes this row one row of its file; resume and duplicate detection go by it."""
        raise AssertionError(f"{type(self).__name__} stands in no file of its own")


R = TypeVar("R", bound="Row")


class Message(Row):
    role: Role
    content: str


class Identified(Row):
    """A row about one prompt or one pair, which `id` names."""

    id: str = Field(min_length=1)

    @property
    def key(self) -> str:
        return self.id


class Prompt(Identified):
    """A conversation that ends with a user turn, waiting for a reply."""

    prompt: list[Message] = Field(min_length=1)
    kind: Kind | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.prompt[-1].role != "user":
            raise ValueError(f"a prompt must end with a user turn, this one ends with {self.prompt[-1].role!r}")
        if any(m.role == "system" for m in self.prompt[1:]):
            raise ValueError("a system message can only come first")
        return self


class Sample(Prompt):
    """A prompt with one reply of a model. `finish_reason`: "stop" (end of turn) or "length" (cut at the limit)."""

    sample_index: int = Field(ge=0)
    completion: list[Message] = Field(min_length=1, max_length=1)
    finish_reason: str | None

    @model_validator(mode="after")
    def _completed_by_the_assistant(self) -> Self:
        if self.completion[0].role != "assistant":
            raise ValueError("completion must be one assistant message")
        return self

    @property
    def key(self) -> str:
        return f"{self.id}/{self.sample_index}"

    @property
    def reply(self) -> str:
        return self.completion[0].content


class Turn(Row):
    """One round of revision: `response` is what was criticised and revised (null critique: revised directly)."""

    round: int = Field(ge=1)
    principle_id: str
    critique: str | None
    response: str


class Critique(Sample):
    """A sample and a critique of its reply. `history` holds the rounds before this one."""

    history: list[Turn]
    round: int = Field(ge=1)
    principle_id: str
    critique: str


class Revision(Sample):
    """A sample whose `completion` is the latest revision; `history[k].response` is what round k+1 revised."""

    history: list[Turn] = Field(min_length=1)


class Vote(Row):
    """One judgement of one pair. `order`: "ab" when `chosen` stood first, "ba" when `rejected` did.

    `p_first` is the probability given to whatever stood first: a judge that only likes the first position shows
    high values in both orders.
    """

    principle_id: str
    method: str
    order: Literal["ab", "ba"]
    p_first: float = Field(ge=0, le=1)
    rationale: str | None


class Preference(Identified):
    """A compared pair. `p_chosen` is the mean over votes of the probability of `chosen`, so never under one half; a
    pair that humans labelled has 1 and no votes. `human`: which of the two humans preferred, where the input says."""

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)
    p_chosen: float = Field(ge=0.5, le=1)
    votes: list[Vote]
    human: Literal["chosen", "rejected"] | None
    source: str | None


class JudgedPair(Identified):
    """A pair that a preference model was not trained on, with the scores (logits) and lengths of its two replies."""

    source: str | None
    p_chosen: float = Field(ge=0.5, le=1)
    chosen_score: float
    rejected_score: float
    chosen_tokens: int = Field(ge=0)
    rejected_tokens: int = Field(ge=0)

    @property
    def margin(self) -> float:
        """The log-odds that the preference model gives to `chosen`."""
        return self.chosen_score - self.rejected_score


class Scored(Sample):
    """A conversation with the score of a preference model: a logit, comparable under one preference model only."""

    score: float


class PolicySample(Scored):
    """A scored reply of the policy that `cai rl` trains, to a held-out prompt after `step` steps (0: before any).
    `watch_score`: what the watcher gave it, null without one."""

    step: int = Field(ge=0)
    reply_tokens: int = Field(ge=0)
    watch_score: float | None

    @property
    def key(self) -> str:
        return f"{self.id}/{self.sample_index}/{self.step}"


class EvaluationQuestion(Identified):
    """A question of the published evaluations (HHH and others): `corrects` and `incorrects` are the answers that may
    follow `prompt`; `text_correct`, `text_incorrect` the same as whole conversations, for a preference model."""

    prompt: str = Field(min_length=1)
    corrects: list[str] = Field(min_length=1)
    incorrects: list[str] = Field(min_length=1)
    text_correct: str | None = None
    text_incorrect: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _options_differ(self) -> Self:
        if not all(self.options) or len(set(self.options)) < len(self.options):
            raise ValueError("the options must differ, and none may be empty")
        return self

    @property
    def options(self) -> list[str]:
        """In the order of their letters, as the prompt shows them."""
        return sorted([*self.corrects, *self.incorrects])


def parse_question(value: object) -> EvaluationQuestion:
    """An EvaluationQuestion row; one that has no id, as published, is named by the hash of what it says. Raises
    RowError."""
    if isinstance(value, dict) and value.get("id") is None:
        value = {**value, "id": content_hash(value)}
    return load_row(EvaluationQuestion, value)


def content_hash(value: object) -> str:
    """Names a row without an id: a hash of its canonical JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class Asking(Row):
    """A question as it was put once: its options, which of them are correct, the normalised probability of each."""

    options: list[str]
    correct: list[bool]
    p: list[float]


class EvaluationResult(Identified):
    """How a model answered one question. `p_correct`: mean over askings; `right`: the likeliest option is correct;
    a tie with an incorrect one is not right."""

    askings: list[Asking] = Field(min_length=1)
    p_correct: float = Field(ge=0, le=1)
    right: bool
    tie: bool
    source: str | None


class Duel(Identified):
    """Replies of two models to one prompt, compared. `p_a` is the probability that `a` is the better one, 0.5 a tie.

    By a preference model: its scores (logits). By a judge: its votes, in which "ab" means that `a` stood first; equal
    replies are a tie that nobody is asked about.
    """

    prompt_id: str
    sample_index: int
    prompt: list[Message] = Field(min_length=1)
    kind: Kind | None
    model_a: str
    model_b: str
    a: list[Message] = Field(min_length=1, max_length=1)
    b: list[Message] = Field(min_length=1, max_length=1)
    score_a: float | None
    score_b: float | None
    p_a: float = Field(ge=0, le=1)
    votes: list[Vote]


class HarmScore(Sample):
    """A reply and how harmful a judge finds it: `harm` from 0 to 4, the mean of the `levels` (probabilities of 0, 1,
    2, 3, 4)."""

    harm: float = Field(ge=0, le=4)
    levels: list[float] = Field(min_length=5, max_length=5)


# Why a pair with votes is rejected by `label-prefs`.
TIE, UNSURE = "tie", "under --min-confidence"


class Rejected(Row):
    """A row that could not be done, and why. `row` is the input row as JSON text, so that
    `jq -r .row OUT.rejected.jsonl | cai STAGE - ...` asks again; of `label-prefs` it is the pair, and for the reasons
    `TIE` and `UNSURE` the Preference it would have been, with its votes.

    Of a line that was no row, `key` is "line N" and `row` the line as it stood (Latin-1 where it is not UTF-8)."""

    key_: str = Field(alias="key")
    reason: str
    row: str

    @property
    def key(self) -> str:
        return self.key_


def reason_kind(reason: str) -> str:
    """What rejected rows are counted by: what stands before a colon, after which only details of one row come."""
    return reason.partition(": ")[0]


class Asked(Row):
    """A unit of work in the order in which it was asked (`OUT.units.jsonl`). `digest`: 32 bits of its content."""

    key_: str = Field(alias="key")
    line: int
    digest: int

    @property
    def key(self) -> str:
        return self.key_


def reject(key: str, reason: str, row: Row) -> Rejected:
    return Rejected(key=key, reason=reason, row=dump_row(row).decode())


def dump_row(row: Row) -> bytes:
    """One JSON object without the newline; keys in the order of the fields."""
    return orjson.dumps(row.model_dump(by_alias=True))


def load_row(row_type: type[R], value: object) -> R:
    """A parsed JSON object as `row_type`; raises RowError with the first thing that is wrong."""
    if not isinstance(value, dict):
        raise RowError(f"a {row_type.__name__} row must be a JSON object, this is {json_type(value)}")
    try:
        return row_type.model_validate(value)
    except ValidationError as error:
        raise RowError(_first_problem(row_type, error)) from None


def _first_problem(row_type: type[Row], error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = f"field {where!r} is missing"
    elif first["type"] == "extra_forbidden":
        message = f"unknown field {where!r}"
    elif where:
        message = f"field {where!r}: {message[0].lower()}{message[1:]}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"not a {row_type.__name__} row: {message}{more}"


def json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def conversation_id(messages: list[Message]) -> str:
    """The id of a prompt that came without one: a hash of its canonical JSON."""
    canonical = orjson.dumps([[m.role, m.content] for m in messages])
    return hashlib.sha256(canonical).hexdigest()[:16]


# --- prompts as they come ---------------------------------------------------------------------------------------

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
        row_type = PolicySample if "watch_score" in value else Scored
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
