"""`cai convert`: rows of any format that is read, as rows of `cai`, which TRL's trainers read too.

The file is read once, row by row. With `--prompts` the replies of a batch result are joined to their prompts by
custom_id, through an index on disk, so that memory does not depend on the number of prompts.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import orjson

from cai_cli.common.errors import InvalidRow, RowError, UsageError
from cai_cli.common.hash_index import KeyTable
from cai_cli.data.dropped import Dropped
from cai_cli.data.foreign.batches import is_batch_result, replies_of
from cai_cli.data.formats import (
    completed_row,
    conversation_hash,
    format_name,
    parse_preference,
    parse_prompt,
    readable_type,
)
from cai_cli.data.jsonl import Numbered, display_name, origin, read_prompts, read_rows, skip_unusable
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Identified, Kind, Preference, Prompt, Row, Sample, conversation_id, dump_row, load_row
from cai_cli.runtime.config import Effect, Option, option, redefine
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.file_transform import rewrite
from cai_cli.runtime.manifest import hash_input, provenance
from cai_cli.runtime.shared_options import OutputOptions, RowInputOptions
from cai_cli.runtime.sinks import Sink
from cai_cli.runtime.work_items import item_digest

if TYPE_CHECKING:
    import sqlite3

ROWS_PER_WRITE = 1000


class Target(StrEnum):
    """The rows that `cai convert` writes."""

    AUTO = "auto"
    PROMPTS = "prompts"
    COMPLETIONS = "completions"
    PAIRS = "pairs"


ROW_TYPES: dict[Target, type[Row]] = {
    Target.PROMPTS: Prompt,
    Target.COMPLETIONS: Sample,
    Target.PAIRS: Preference,
}


class ConvertConfig(OutputOptions, RowInputOptions):
    """Convert rows of other tools to rows of cai.

    INPUT: conversations (`messages`, ShareGPT, LMSYS, Alpaca, questions and answers, prompts with completions), pairs
    (HH-RLHF, UltraFeedback, replies beside their prompt), or results of OpenAI's and Anthropic's batch files with
    --prompts; as JSONL, one JSON array, printed JSON, CSV, TSV, parquet, hf://datasets/OWNER/NAME?config=C&split=S, or
    plain text. Prints what was read, left out and rejected.
    """

    output: str = redefine(OutputOptions, "output", ...)
    to: Target = option(Target.AUTO, "Rows to write; auto takes what the first row holds.")
    prompts: str | None = option(
        None,
        "Requests of a batch result, or prompts with the same ids, to join by custom_id.",
        Option(Effect.HASHED, reads_file=True),
    )
    soft_from: str | None = option(
        None,
        "Labels of pairs from their scores NAME_chosen and NAME_rejected; by default p_chosen is 1.",
        Option(metavar="NAME"),
    )
    kind: Kind | None = option(None, "Kind of the prompts that have no `kind`.")

    def check(self) -> None:
        super().check()
        if self.soft_from and self.to not in (Target.AUTO, Target.PAIRS):
            raise UsageError("--soft-from is for pairs", hint="--to pairs", code="option-conflict")


class PromptIndex:
    """The prompts of a file by their ids, on disk."""

    def __init__(self, database: "sqlite3.Connection") -> None:
        self.database = database

    @classmethod
    @contextmanager
    def of_file(cls, source: str | None) -> Iterator["PromptIndex | None"]:
        """The index of a file of prompts or of batch requests; None without a file. Raises CaiError."""
        import sqlite3

        if source is None:
            yield None
            return
        with TemporaryDirectory() as folder, closing(sqlite3.connect(Path(folder) / "prompts")) as database:
            database.execute("PRAGMA synchronous=OFF")
            database.execute("CREATE TABLE prompts (id TEXT PRIMARY KEY, row BLOB) WITHOUT ROWID")
            rows = ((p.id, dump_row(p)) for _, p in read_prompts(source, on_invalid=skip_unusable))
            database.executemany("INSERT OR IGNORE INTO prompts VALUES (?, ?)", rows)
            yield cls(database)

    def get(self, name: str) -> Prompt:
        """The prompt with this id. Raises RowError where there is none."""
        found = self.database.execute("SELECT row FROM prompts WHERE id = ?", (name,)).fetchone()
        if found is None:
            raise RowError(f"no prompt with the id {name!r:.80} in --prompts", code="invalid-row")
        return load_row(Prompt, orjson.loads(found[0]))


class Converter:
    """Converts the rows of one file.

    Args:
        options: What to write.
        source: The name of the file, the `source` of rows that have none.
        prompts: The prompts of batch results, or None.

    Attributes:
        dropped: The columns that were left out.
        counts: Receives the formats that were read.
    """

    def __init__(self, options: ConvertConfig, source: str, prompts: PromptIndex | None, counts: Counts) -> None:
        self.options, self.source, self.prompts = options, source, prompts
        self.row_type = ROW_TYPES.get(options.to)
        self.dropped, self.counts = Dropped(), counts

    def rows(self, value: object) -> list[Identified]:
        """The rows of one row of the file. Raises RowError."""
        if isinstance(value, dict) and is_batch_result(value) and self.row_type in (None, Sample):
            rows: list[Identified] = list(self._joined(value))
        else:
            rows = [self._row(value)]
        self.row_type = self.row_type or type(rows[0])
        self.counts.read_as[format_name(value)] += 1
        return rows

    def _row(self, value: object) -> Identified:
        row_type = self.row_type or readable_type(value)
        if row_type is Preference:
            return parse_preference(value, source=self.source, soft_from=self.options.soft_from, dropped=self.dropped)
        if row_type is Prompt:
            return parse_prompt(value, source=self.source, kind=self.options.kind, dropped=self.dropped)
        if row_type is Sample:
            sample = completed_row(value, source=self.source, dropped=self.dropped)
            kind = self.options.kind if sample.kind is None else sample.kind
            return Sample.model_validate(sample.sample_fields() | {"kind": kind})
        raise RowError(f"a {row_type.__name__} row, which is a row of cai already", code="wrong-row-type")

    def _joined(self, value: dict[str, Any]) -> Iterator[Sample]:
        if self.prompts is None:
            hint = "--prompts FILE names the requests, or the prompts with the same ids"
            raise RowError("a batch result, which does not hold its prompt", hint, code="invalid-row")
        for reply in replies_of(value, self.dropped):
            prompt = self.prompts.get(reply.custom_id)
            fields = {
                "kind": self.options.kind if prompt.kind is None else prompt.kind,
                "sample_index": reply.index,
                "completion": [{"role": "assistant", "content": reply.text}],
                "finish_reason": reply.finish_reason,
            }
            yield load_row(Sample, prompt.model_dump() | fields)


def distinct(rows: Iterable[Numbered[list[Identified]]], name: str, counts: Counts) -> Iterator[Numbered[Identified]]:
    """The rows with a key of their own; repeated rows are counted as skipped.

    A second reply to a prompt without an id gets the hash of its whole conversation as its id.

    Raises:
        InvalidRow: An id from the input is used for two different rows.
    """
    seen, first_lines = KeyTable(), KeyTable()
    for line, group in rows:
        for given in group:
            row = given
            counts.items += 1
            digest = item_digest(row)
            first = seen.add(row.key, digest)
            if first not in (None, digest) and isinstance(row, Sample) and row.id == conversation_id(row.prompt):
                row = row.model_copy(update={"id": conversation_hash(row)})
                digest = item_digest(row)
                first = seen.add(row.key, digest)
            if first is None:
                first_lines.add(row.key, line)
                yield line, row
            elif first == digest:
                counts.skipped["the same as an earlier line"] += 1
            else:
                reason = f"id {row.key!r:.80} was already used on line {first_lines.get(row.key)}"
                raise InvalidRow(name, line, reason, "ids must be unique", code="duplicate-id")


def run(config: ConvertConfig) -> None:
    """Write the rows of a file as rows of `cai`, and print what was read and what was left out.

    Raises:
        CaiError: A file cannot be read or written, or a row is not valid.
    """
    inputs = {"rows": hash_input(config.input)}
    if config.prompts:
        inputs["prompts"] = hash_input(config.prompts)
    reader = config.row_reader()

    def fill(sink: Sink, counts: Counts) -> None:
        with PromptIndex.of_file(config.prompts) as index:
            converter = Converter(config, origin(config.input), index, counts)
            read = read_rows(config.input, converter.rows, reader.on_invalid, columns=reader.columns, text=True)
            rows = distinct(islice(read, config.limit), display_name(config.input), counts)
            while group := [row for _, row in islice(rows, ROWS_PER_WRITE)]:
                sink.write(group)
                _write_rejected(sink, reader, counts)
            _write_rejected(sink, reader, counts)
            counts.dropped = converter.dropped

    made_by = provenance("convert", inputs=inputs, settings=config.settings())
    output = Path(config.output)
    rewrite(output, made_by, inputs, fill, overwrite=config.overwrite, as_json=config.as_json)


def _write_rejected(sink: Sink, reader: RowReader, counts: Counts) -> None:
    rejected = reader.take_invalid()
    counts.items += len(rejected)
    sink.write(rejected)
