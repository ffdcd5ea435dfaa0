"""Every JSONL row type, in the order of the road (`forms` reads the other forms in which prompts come).

Shapes follow TRL's conversational dataset formats, so `datasets.load_dataset("json", data_files=...)` and any TRL
trainer read every file as it is. Every field is always present, with one type (null allowed where said).
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
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @property
    def key(self) -> str:
        """What makes this row one row of its file; resume and duplicate detection go by it."""
        raise AssertionError(f"{type(self).__name__} stands in no file of its own")


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

    def sample_fields(self) -> dict[str, Any]:
        """Of this row or one that holds more, what a sample has: each kind of row made of a sample starts from it."""
        return {name: getattr(self, name) for name in Sample.model_fields}


class RevisionRound(Row):
    """One round of revision: `response` is what was criticised and revised (null critique: revised directly)."""

    round: int = Field(ge=1)
    principle_id: str
    critique: str | None
    response: str


class Critique(Sample):
    """A sample and a critique of its reply. `history` holds the rounds before this one."""

    history: list[RevisionRound]
    round: int = Field(ge=1)
    principle_id: str
    critique: str


class Revision(Sample):
    """A sample whose `completion` is the latest revision; `history[k].response` is what round k+1 revised."""

    history: list[RevisionRound] = Field(min_length=1)


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
    `monitor_score`: the score of the monitor model, null without one (`watch_score` in files of version 0.1.0)."""

    step: int = Field(ge=0)
    reply_tokens: int = Field(ge=0)
    monitor_score: float | None = Field(validation_alias=AliasChoices("monitor_score", *old_names("monitor_score")))

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


class OptionScores(Row):
    """A question as it was put once: its options, which of them are correct, the normalised probability of each."""

    options: list[str]
    correct: list[bool]
    p: list[float]


class EvaluationResult(Identified):
    """How a model answered one question. `p_correct`: mean over askings; `right`: the likeliest option is correct;
    a tie with an incorrect one is not right."""

    askings: list[OptionScores] = Field(min_length=1)
    p_correct: float = Field(ge=0, le=1)
    right: bool
    tie: bool
    source: str | None


class ModelComparison(Identified):
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


def with_votes(rejected: Rejected) -> Preference | None:
    """The Preference that a rejected row of `label-prefs` would have been, None if it has no votes. Raises RowError."""
    if rejected.reason not in (TIE, UNSURE):
        return None
    try:
        return load_row(Preference, orjson.loads(rejected.row))
    except orjson.JSONDecodeError as error:
        raise RowError(f"its `row` is not JSON: {error}") from None


def reason_kind(reason: str) -> str:
    """What rejected rows are counted by: what stands before a colon, after which only details of one row come."""
    return reason.partition(": ")[0]


class WorkItemRecord(Row):
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
