"""`cai score`: the score that a preference model gives a conversation (paper section 4.1).

A score is a logit: the difference of two is the log-odds that the first conversation is preferred. Beside the scores of
another preference model it means nothing. The tokens scored are those that `train-pm` and `rl` score.
"""

from cai_cli.cli import options
from cai_cli.data.formats import conversation_hash, conversations, scorable
from cai_cli.data.jsonl import origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Sample
from cai_cli.reward.scorer import Scorer
from cai_cli.runtime.manifest import hash_input, provenance, settings_of
from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems


def units(reader: RowReader, source: str, limit: int | None) -> WorkItems[Sample]:
    """Every conversation of the file, by (id, sample_index)."""
    name = origin(source)
    for line, row in reader.rows(source, lambda value: scorable(value, name), limit):
        for conversation in conversations(row):
            yield WorkItem(conversation.key, line, conversation, hashed_id=row.id == conversation_hash(row))


def command(
    input: options.Input,
    pm: options.PreferenceModel,
    output: options.Output = "-",
    limit: options.Limit = None,
    shard: options.Shard = None,
    skip_invalid: options.SkipInvalid = False,
    max_invalid: options.MaxInvalid = None,
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
    reader = RowReader.of(flags)
    inputs = {"conversations": hash_input(input)}
    scorer, lines = Scorer(pm, batch_size, device), inputs["conversations"].lines
    StageRun(
        provenance=provenance(
            "score", inputs=inputs, settings=settings_of(flags), pm={"fingerprint": scorer.base.fingerprint}
        ),
        inputs=inputs,
        output=output,
        overwrite=overwrite,
        reader=reader,
        units=lambda: units(reader, input, limit),
        work=scorer.score,
        window=4 * scorer.batch_size,
        total=None if lines is None else min(lines, limit or lines),
    ).run(as_json=json)
