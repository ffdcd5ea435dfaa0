"""`cai score`: the score that a preference model gives a conversation (paper section 4.1).

A score is a logit: the difference of two is the log-odds that the first conversation is preferred. Beside the scores of
another preference model it means nothing. The tokens scored are those that `train-pm` and `rl` score.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from cai_cli import options
from cai_cli.errors import RowError
from cai_cli.forms import parse_preference
from cai_cli.intake import Intake
from cai_cli.jsonl import origin
from cai_cli.manifest import hash_input, provenance, settings_of
from cai_cli.phase1_supervised.sft import completed_row
from cai_cli.phase2_feedback.preference_model import encode_conversation, open_for_scores, score_ids
from cai_cli.records import Preference, Rejected, Sample, Scored, conversation_id, reject
from cai_cli.stage import Job, Unit, Units
from cai_cli.training import context_window, pick_device
from cai_cli.training_job import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score(
    rows: Sequence[Sample], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int
) -> Iterator[Scored | Rejected]:
    """Each conversation with its score, in order; one that does not fit the model is rejected."""
    window = context_window(model.config, tokenizer)
    ids: list[list[int] | str] = []  # or why there are none
    for row in rows:
        try:
            encoded = encode_conversation(tokenizer, [*row.prompt, *row.completion])
            fits = len(encoded) <= window
            ids.append(encoded if fits else f"longer than the preference model's window of {window:,} tokens")
        except RowError as error:
            ids.append(error.message)
    fitting = [(row.key, encoded) for row, encoded in zip(rows, ids, strict=True) if not isinstance(encoded, str)]
    names, sequences = [key for key, _ in fitting], [encoded for _, encoded in fitting]
    scores = iter(score_ids(model, tokenizer, sequences, batch_size, names))
    for row, encoded_or_reason in zip(rows, ids, strict=True):
        if isinstance(encoded_or_reason, str):
            yield reject(row.key, encoded_or_reason, row)
        else:
            yield Scored(**row.sample_fields(), score=next(scores))


class Scorer:
    """A preference model that scores rows; loaded when it is first asked, so that finished work costs no load."""

    def __init__(self, name: str, batch_size: int | None, device: str) -> None:
        self.base, self.batch_size, self.device = Base.resolve(name), batch_size or 16, device

    @cached_property
    def _loaded(self) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        return open_for_scores(self.base.path, pick_device(self.device))

    def score(self, rows: Sequence[Sample]) -> Iterator[Scored | Rejected]:
        """As the function `score`."""
        return score(rows, *self._loaded, self.batch_size)


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
    return row if value.get("id") is not None else row.model_copy(update={"id": _hash(row)})


def conversations(row: Sample | Preference) -> list[Sample]:
    """The conversations of a row: of a pair `chosen` (sample_index 0) and `rejected` (1), otherwise one."""
    if isinstance(row, Sample):
        return [Sample.model_validate(row.sample_fields())]
    shared = {"id": row.id, "prompt": row.prompt, "source": row.source, "finish_reason": None}
    replies = enumerate((row.chosen, row.rejected))
    return [Sample.model_validate(shared | {"sample_index": i, "completion": reply}) for i, reply in replies]


def _hash(row: Sample | Preference) -> str:
    replies = row.completion if isinstance(row, Sample) else [*row.chosen, *row.rejected]
    return conversation_id([*row.prompt, *replies])


def units(intake: Intake, source: str, limit: int | None) -> Units[Sample]:
    """Every conversation of the file, by (id, sample_index)."""
    name = origin(source)
    for line, row in intake.rows(source, lambda value: scorable(value, name), limit):
        for conversation in conversations(row):
            yield Unit(conversation.key, line, conversation, hashed_id=row.id == _hash(row))


def command(
    input: options.Input,
    pm: options.PreferenceModel,
    output: options.Output = "-",
    limit: options.Limit = None,
    shard: options.Shard = None,
    skip_bad: options.SkipBad = False,
    max_bad: options.MaxBad = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score conversations with a preference model.

    INPUT: Sample, Revision or Preference rows, {"messages": [...]}, {"prompt", "completion"}, or pairs that humans
    labelled. Writes Scored rows, one a conversation; of a pair sample_index 0 is `chosen` and 1 is `rejected`.
    """
    flags = locals()
    intake = Intake.of(flags)
    inputs = {"conversations": hash_input(input)}
    scorer, lines = Scorer(pm, batch_size, device), inputs["conversations"].lines
    Job(
        provenance=provenance(
            "score", inputs=inputs, settings=settings_of(flags), pm={"fingerprint": scorer.base.fingerprint}
        ),
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        intake=intake,
        units=lambda: units(intake, input, limit),
        work=scorer.score,
        window=4 * scorer.batch_size,
        total=None if lines is None else min(lines, limit or lines),
    ).run(as_json=json)
