"""Every JSONL row type, in the order in which the pipeline writes them (`formats` reads foreign formats).

Shapes follow TRL's conversational dataset formats, so `datasets.load_dataset("json", data_files=...)` and any TRL
trainer read every file as it is. Every field is always present and has one type; only those marked `| None` may be
null. A conversation is a list of messages.
"""

import hashlib
from typing import Any, Literal, Self, TypeVar

import orjson
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cai_cli.common.errors import RowError
from cai_cli.common.legacy import old_names

R = TypeVar("R", bound="Row")
Role = Literal["system", "user", "assistant"]
Kind = Literal["red-team", "helpful"]


class Row(BaseModel):
    """A JSON object with exactly the fields of its class. Immutable; unknown fields and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @property
    def key(self) -> str:
        """Identifies this row within its file. Resume and duplicate detection compare keys."""
        raise AssertionError(f"rows of type {type(self).__name__} are not stored in a file of their own")


class Message(Row):
    """One turn of a conversation."""

    role: Role
    content: str


class Identified(Row):
    """A row with an id: that of its prompt, of its pair or of its question.

    Attributes:
        id: As the input gives it, else a hash of the content (`conversation_id`).
    """

    id: str = Field(min_length=1)

    @property
    def key(self) -> str:
        return self.id


class Prompt(Identified):
    """A conversation that ends with a user turn and has no reply yet.

    Attributes:
        prompt: The turns, the last one the user's; a system message may come first.
        kind: "red-team" (meant to provoke a harmful reply, paper section 3.2), "helpful", or null if unknown.
        source: Where the prompt comes from, such as the name of its file.
    """

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

    def prompt_fields(self) -> dict[str, Any]:
        """The fields of Prompt by name. Subclasses have more; a sample copies these."""
        return {name: getattr(self, name) for name in Prompt.model_fields}


class Sample(Prompt):
    """A prompt with one reply of a model (TRL's prompt-completion format).

    Attributes:
        sample_index: The number of this reply among those sampled for the prompt, from 0.
        completion: The reply as one assistant message.
        finish_reason: "stop" (end of turn), "length" (cut off at the token limit, or inside a character), or null if
            unknown.
        thoughts: What a reasoning model wrote before the reply, without its tags; null without thoughts. No
            stage shows it to another model, and only `rl` trains on it.
    """

    sample_index: int = Field(ge=0)
    completion: list[Message] = Field(min_length=1, max_length=1)
    finish_reason: str | None
    thoughts: str | None = Field(default=None, repr=False)  # version 0.1.0 digested the repr

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
        """The text of the completion."""
        return self.completion[0].content

    def sample_fields(self) -> dict[str, Any]:
        """The fields of Sample by name. Subclasses have more; every row made from a sample copies these."""
        return {name: getattr(self, name) for name in Sample.model_fields}


class RevisionRound(Row):
    """One round of critique and revision (paper section 3.1).

    Attributes:
        round: From 1.
        principle_id: The principle drawn for this round.
        critique: The critique of `response`; null if it was revised without one (paper section 3.5).
        response: The reply before this round, which the round revised.
        finish_reason: How `response` ended, as in a Sample; null in rows of version 0.1.0.
        thoughts: The thoughts before `response`, as in a Sample.
    """

    round: int = Field(ge=1)
    principle_id: str
    critique: str | None
    response: str
    finish_reason: str | None = Field(default=None, repr=False)  # version 0.1.0 digested the repr
    thoughts: str | None = Field(default=None, repr=False)


class ContrastSample(Sample):
    """A reply of a character that follows or breaks a principle (`cai sample --contrast`).

    The prompt begins with the character as its system prompt.

    Attributes:
        principle_id: The principle drawn for the reply.
        contrast: Whether the character follows the principle or breaks it.
        own_system: The system prompt that the prompt had before, which stands behind the character; null without one.
    """

    principle_id: str
    contrast: Literal["following", "breaking"]
    own_system: str | None = None


class Critique(Sample):
    """A sample and a critique of its reply, which is not revised yet.

    Attributes:
        history: The rounds before this one, oldest first.
        round: The round that the critique belongs to, from 1.
        principle_id: The principle drawn for this round.
        critique: The critique of `completion`.
    """

    history: list[RevisionRound]
    round: int = Field(ge=1)
    principle_id: str
    critique: str


class Revision(Sample):
    """A revised sample (paper section 3.1): `completion` is the latest revision.

    Attributes:
        history: Every round, oldest first; `history[0].response` is the reply that was sampled.
    """

    history: list[RevisionRound] = Field(min_length=1)


class Vote(Row):
    """One judgement of one pair by one principle in one order (paper section 4.1).

    Attributes:
        principle_id: The principle by which the replies were compared.
        method: The judging method (`label-prefs --method`); "unjudged" in rows that no judge compared (`cai pairs`).
        order: "ab" if the judge saw `chosen` (or model a's reply) first, "ba" if it saw it second.
        p_first: Probability that the reply shown first is the better one. A judge with a first-position bias gives
            high values in both orders.
        rationale: The judge's chain of thought, if the method has one.
    """

    principle_id: str
    method: str
    order: Literal["ab", "ba"]
    p_first: float = Field(ge=0, le=1)
    rationale: str | None


class Pair(Identified):
    """Two replies to one prompt, to be compared; their order says nothing about which is better.

    Attributes:
        prompt: The conversation that both replies continue.
        a: One reply, as one assistant message.
        b: The other one.
        human: The reply that humans preferred, if the input says so.
        source: Where the pair comes from.
        a_finish_reason: How `a` ended, as in a Sample; null if unknown.
        b_finish_reason: How `b` ended.
    """

    prompt: list[Message]
    a: list[Message]
    b: list[Message]
    human: Literal["a", "b"] | None
    source: str | None
    a_finish_reason: str | None = Field(default=None, repr=False)  # version 0.1.0 digested the repr
    b_finish_reason: str | None = Field(default=None, repr=False)


class Preference(Identified):
    """A pair with a preference label (TRL's preference format with an explicit prompt; paper section 4.1).

    Attributes:
        prompt: The conversation that both replies continue.
        chosen: The preferred reply, as one assistant message.
        rejected: The other reply.
        p_chosen: Soft label: the mean over votes of the probability that `chosen` is better, within the limits of
            `--clamp`, so at least 0.5. It is 1 for a pair that humans labelled. At exactly 0.5, a tie, neither reply is
            preferred, and `chosen` is the first one of the pair.
        votes: The judgements behind the label; empty for a pair that humans labelled.
        human: The reply that humans preferred, if the input says so.
        source: Where the pair comes from.
        chosen_finish_reason: How `chosen` ended, as in a Sample; null if unknown, as in data labelled by humans.
        rejected_finish_reason: How `rejected` ended.
    """

    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)
    p_chosen: float = Field(ge=0.5, le=1)
    votes: list[Vote]
    human: Literal["chosen", "rejected"] | None
    source: str | None
    chosen_finish_reason: str | None = None
    rejected_finish_reason: str | None = None


class ProposedPrinciple(Identified):
    """A principle that a model proposed to explain the preference of a pair (`cai principles learn`).

    Attributes:
        sample_index: The number of this proposal among those for the pair, from 0.
        comparison: The principle, as a question of a constitution.
    """

    sample_index: int = Field(ge=0)
    comparison: str = Field(min_length=1)

    @property
    def key(self) -> str:
        return f"{self.id}/{self.sample_index}"


class JudgedPair(Identified):
    """A held-out pair scored by a trained preference model, or by the implicit reward of a policy of `cai dpo`.

    Attributes:
        prompt_id: The id of the prompt's conversation, equal for the pairs of one prompt; None before version 0.2.
        source: Where the pair comes from.
        p_chosen: The pair's soft label.
        chosen_score: The score of `chosen`, a logit.
        rejected_score: The score of `rejected`, a logit.
        chosen_tokens: The length of `chosen` in tokens.
        rejected_tokens: The length of `rejected` in tokens.
    """

    prompt_id: str | None = None
    source: str | None
    p_chosen: float = Field(ge=0.5, le=1)
    chosen_score: float
    rejected_score: float
    chosen_tokens: int = Field(ge=0)
    rejected_tokens: int = Field(ge=0)

    @property
    def margin(self) -> float:
        """The log-odds of `chosen` under the preference model: the difference of the two scores."""
        return self.chosen_score - self.rejected_score


class Scored(Sample):
    """A conversation scored by a preference model.

    Attributes:
        score: A logit. Scores of two preference models are not comparable.
    """

    score: float


class PolicySample(Scored):
    """A scored reply of the policy in `cai rl` or `cai dpo` to a held-out prompt.

    Attributes:
        score: That of the preference model, in `dpo` the implicit reward; null in `rl` without a preference model.
        judge_score: The weighted mean of the log-odds that the judge of `rl --judge` gives, in nats; null without a
            judge, and where it did not answer.
        step: The number of training steps before the reply was sampled; 0 is the policy before training.
        reply_tokens: The length of the reply in tokens.
        monitor_score: The score of the monitor model, which is not used as the reward; null without one.
    """

    score: float | None  # type: ignore[assignment]
    judge_score: float | None = None
    step: int = Field(ge=0)
    reply_tokens: int = Field(ge=0)
    monitor_score: float | None = Field(validation_alias=AliasChoices("monitor_score", *old_names("monitor_score")))

    @property
    def key(self) -> str:
        return f"{self.id}/{self.sample_index}/{self.step}"


# The reasons for which `label-prefs` rejects a pair that has votes.
TIE, UNSURE = "tie", "under --min-confidence"


class Rejected(Row):
    """A row that could not be processed, in `OUT.rejected.jsonl`.

    `jq -r .row OUT.rejected.jsonl | cai STAGE - ...` tries the rows again.

    Attributes:
        key: The key of the input row, or "line N" for a line that is not a valid row.
        reason: Why. The text before the first colon is the kind of reason, by which rows are counted.
        row: The input row as JSON text; for an invalid line its text (decoded as Latin-1 where it is not UTF-8). For
            `label-prefs` it is the pair or, for the reasons `TIE` and `UNSURE`, the Preference with its votes.
    """

    key_: str = Field(alias="key")
    reason: str
    row: str

    @property
    def key(self) -> str:
        return self.key_


def with_votes(rejected: Rejected) -> Preference | None:
    """The Preference, with its votes, in a row that `label-prefs` rejected; None if it has no votes.

    Raises:
        RowError: The rejected row is not valid.
    """
    if rejected.reason not in (TIE, UNSURE):
        return None
    try:
        return load_row(Preference, orjson.loads(rejected.row))
    except orjson.JSONDecodeError as error:
        raise RowError(f"its `row` is not JSON: {error}", code="invalid-row") from None


def reason_kind(reason: str) -> str:
    """The kind of a rejection, by which rejected rows are counted: the text before the details of one row.

    >>> reason_kind("bad line: in.jsonl:2: not JSON")
    'bad line'
    """
    return reason.partition(": ")[0]


class WorkItemRecord(Row):
    """One work item of a shard, in input order (`OUT.units.jsonl`).

    Attributes:
        key: The key of the row.
        line: Its line in the input, from 1.
        digest: 32 bits of a hash of its content.
    """

    key_: str = Field(alias="key")
    line: int
    digest: int

    @property
    def key(self) -> str:
        return self.key_


def reject(key: str, reason: str, row: Row) -> Rejected:
    """`row` as a rejected row, with the reason."""
    return Rejected(key=key, reason=reason, row=dump_row(row).decode())


def dump_row(row: Row) -> bytes:
    """The row as one line of JSON, without the newline; keys in the order of the fields.

    >>> dump_row(Message(role="user", content="Hello"))
    b'{"role":"user","content":"Hello"}'
    """
    return orjson.dumps(row.model_dump(by_alias=True))


def load_row(row_type: type[R], value: object) -> R:
    """A parsed JSON object as a row of type `row_type`.

    Raises:
        RowError: The object is not a valid row. The message names the first problem and counts the others.

    >>> load_row(Message, {"role": "user", "content": "Hello"})
    Message(role='user', content='Hello')
    """
    if not isinstance(value, dict):
        reason = f"a {row_type.__name__} row must be a JSON object, this is {json_type(value)}"
        raise RowError(reason, code="invalid-row")
    try:
        return row_type.model_validate(value)
    except ValidationError as error:
        raise RowError(_first_problem(row_type, error), code="invalid-row") from None


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
    """The JSON type of a parsed value, as error messages name it.

    >>> json_type([]), json_type(None), json_type(0.5)
    ('a list', 'null', 'a number')
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def conversation_id(messages: list[Message]) -> str:
    """The id for a conversation without one: 16 hex digits of the SHA-256 of its roles and texts.

    >>> conversation_id([Message(role="user", content="Hello")])
    'b0ae8b0f316e2f14'
    """
    canonical = orjson.dumps([[m.role, m.content] for m in messages])
    return hashlib.sha256(canonical).hexdigest()[:16]


def content_hash(value: object) -> str:
    """The id for a row without one: 16 hex digits of the SHA-256 of its canonical JSON.

    >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
