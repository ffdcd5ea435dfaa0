"""Detects the row type of a JSON object by its fields, and reads the rows that `cai` wrote.

Beside `formats`, which reads the rows of others too, no module looks at the fields of a row to tell what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cai_cli.common.errors import RowError
from cai_cli.data.benchmark_schema import BenchmarkPair, BenchmarkReply, StrongRejectScore
from cai_cli.data.evaluation_schema import (
    AdherenceResult,
    EvaluationQuestion,
    EvaluationResult,
    HarmScore,
    LabelledReply,
    ModelComparison,
)
from cai_cli.data.reward_schema import JudgedReplies
from cai_cli.data.schema import (
    ContrastSample,
    Critique,
    JudgedPair,
    Pair,
    PolicySample,
    Preference,
    Prompt,
    ProposedPrinciple,
    Rejected,
    Revision,
    Row,
    Sample,
    Scored,
    WorkItemRecord,
    load_row,
)

# Fields that mark a row type. The first type of which all marking fields are present is the type of the row.
_MARKS: Sequence[tuple[type[Row], frozenset[str]]] = (
    (Rejected, frozenset({"reason", "row"})),
    (WorkItemRecord, frozenset({"key", "digest"})),
    (ModelComparison, frozenset({"model_a", "model_b"})),
    (AdherenceResult, frozenset({"principle_id", "conversation"})),
    (EvaluationQuestion, frozenset({"corrects", "incorrects"})),
    (EvaluationResult, frozenset({"askings"})),
    (JudgedReplies, frozenset({"prompt_hash", "replies"})),
    (JudgedPair, frozenset({"chosen_score", "rejected_score", "chosen_tokens"})),
    (ProposedPrinciple, frozenset({"sample_index", "comparison"})),
    (Critique, frozenset({"critique"})),
    (ContrastSample, frozenset({"sample_index", "contrast"})),
    (HarmScore, frozenset({"harm", "levels"})),
    (StrongRejectScore, frozenset({"strongreject", "refused"})),
    (BenchmarkReply, frozenset({"benchmark", "model", "answers"})),
    (BenchmarkPair, frozenset({"benchmark", "model", "p_chosen"})),
    (LabelledReply, frozenset({"label", "safety"})),
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
