"""`cai score`: score conversations with a preference model (paper section 4.1).

A score is a logit: the difference of two scores is the log-odds that the first conversation is preferred. Scores of
different preference models are not comparable. Conversations are encoded as in `train-pm` and `rl`.
"""

from typing import Any

from cai_cli.data.formats import conversation_hash, conversations, scorable
from cai_cli.data.jsonl import origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Preference, Revision, Sample, Scored
from cai_cli.reward.scorer import PreferenceModelOptions
from cai_cli.runtime.cost import RowFlow, StepCost, TokenCounts
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import DeviceOptions, OutputOptions, ShardOptions
from cai_cli.runtime.stage import Phase, Stage
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems, expected_items


class ScoreConfig(OutputOptions, ShardOptions, DeviceOptions, PreferenceModelOptions):
    """Score conversations with a preference model.

    INPUT: Sample, Revision or Preference rows, or conversations and pairs in any format that `cai convert` reads.
    Writes Scored rows, one for each conversation; for a pair, sample_index 0 is `chosen` and 1 is `rejected`.
    """


def work_items(reader: RowReader, source: str, limit: int | None) -> WorkItems[Sample]:
    """The conversations of a file, each as a work item with the key (id, sample_index)."""
    name = origin(source)
    for line, row in reader.rows(source, lambda value: scorable(value, name, reader.dropped), limit):
        for conversation in conversations(row):
            yield WorkItem(conversation.key, line, conversation, hashed_id=row.id == conversation_hash(row))


def estimate(rows: RowFlow, config: ScoreConfig) -> StepCost:
    """The cost of one forward pass over each conversation."""
    return StepCost(rows.rows, 0, TokenCounts(rows.rows * (rows.prompt_tokens + rows.reply_tokens)), rows)


def run(config: ScoreConfig) -> dict[str, Any]:
    """Score the conversations of a file. Returns the summary. Raises CaiError."""
    reader = config.row_reader()
    inputs = {"conversations": hash_input(config.input)}
    scorer = config.open_scorer(config.batch_size, config.device.value)
    return StageRun(
        provenance=provenance(
            "score", inputs=inputs, settings=config.settings(pm_dtype=scorer.dtype), pm=scorer.identity()
        ),
        inputs=inputs,
        output=config.output,
        overwrite=config.overwrite,
        reader=reader,
        items=lambda: work_items(reader, config.input, config.limit),
        work=scorer.score,
        batch_size=4 * scorer.batch_size,
        grows=True,
        total=expected_items(inputs["conversations"], config.limit),
    ).run(as_json=config.as_json)


STAGE = Stage("score", Phase.FEEDBACK, ScoreConfig, run, estimate, reads=(Sample, Revision, Preference), writes=Scored)
