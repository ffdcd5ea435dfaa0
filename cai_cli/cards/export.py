"""Writes rows as a dataset directory, with typed parquet and a card (`cai export FILE -o DIR`).

`datasets.load_dataset(DIR)` and TRL's trainers read the directory directly. Columns keep their names: samples and
revisions have TRL's prompt-completion format, preferences its explicit-prompt preference format, each with further
columns of `cai`.
"""

import os
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin

from cai_cli.cards.dataset_card import DatasetStats, dataset_card
from cai_cli.common.errors import CaiError, InvalidRow, RowError, UnusableRow, UsageError
from cai_cli.data.formats import completed_row, parse_preference, parse_prompt, readable_type
from cai_cli.data.jsonl import (
    AppendFile,
    display_name,
    origin,
    read_rows,
    read_values,
    rows_of,
    skip_unusable,
)
from cai_cli.data.schema import Critique, Preference, Prompt, Rejected, Revision, Row, Sample, reason_kind, reject
from cai_cli.data.splits import EMPTY_REPLY, pair_problem
from cai_cli.metrics.label_audit import AuditMetrics, LabelAudit, rejected_beside
from cai_cli.runtime.manifest import hash_input, read_manifest
from cai_cli.runtime.output_files import one_writer, sidecar


def first_type(source: str) -> type[Row]:
    """Return the type of a file's rows, judged by its first row.

    Raises:
        CaiError: The file has no rows, or holds rejected rows.
    """
    row_type = next(_row_types(source), None)
    if row_type is None:
        raise CaiError(f"{display_name(source)} holds no rows that can be used", code="no-rows")
    if row_type is Rejected:
        hint = "export the output file that they belong to"
        raise CaiError(f"{source} holds rejected rows, which are not data", hint, code="wrong-row-type")
    return row_type


def row_parser(source: str) -> tuple[type[Row], Callable[[object], Row]]:
    """Return the type of a file's rows, and the parser of that type. Raises as `first_type`."""
    row_type = first_type(source)
    if row_type is Preference:
        return Preference, lambda value: parse_preference(value, source=origin(source))
    if row_type in (Critique, Revision):
        return row_type, rows_of(row_type)
    if issubclass(row_type, Sample):
        return Sample, lambda value: completed_row(value, source=origin(source))
    return Prompt, lambda value: parse_prompt(value, source=origin(source))


def _row_types(source: str) -> Iterator[type[Row]]:
    """The types of the rows that can be used."""
    for line, value in read_values(source):
        try:
            yield readable_type(value)
        except UnusableRow:
            continue
        except RowError as error:
            raise InvalidRow(display_name(source), line, error.message, error.hint, code=error.code) from None


def features(row_type: type[Row]) -> Any:
    """Return the columns of a row type as `datasets.Features`, typed also where all values are null or empty lists."""
    from datasets import Features

    return Features({name: _feature(info.annotation) for name, info in row_type.model_fields.items()})


def _feature(annotation: Any) -> Any:
    from datasets import List, Value

    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _feature(next(a for a in inner if a is not type(None)))
    if origin is list:
        return List(_feature(inner[0]))
    if origin is Literal:
        return Value("string")
    if isinstance(annotation, type) and issubclass(annotation, Row):
        return {name: _feature(info.annotation) for name, info in annotation.model_fields.items()}
    return Value({str: "string", int: "int64", float: "float64"}[annotation])


Writer = Callable[[str, Path], dict[str, Any]]
REJECTED = "rejected.jsonl"  # in the directory that `export` writes


def training_problem(row: Row) -> str | None:
    """The reason for which a row would teach a trainer nothing, or an empty reply; None for other rows."""
    if isinstance(row, Preference):
        return pair_problem(row.chosen, row.rejected)
    return EMPTY_REPLY if isinstance(row, Sample) and not row.reply.strip() else None


def usable_rows(
    source: str,
    parse: Callable[[object], Row],
    stats: DatasetStats,
    rejected: AppendFile,
    problem: Callable[[Row], str | None] = training_problem,
) -> Iterator[Row]:
    """Yield the rows of `source` that can be used; the others go to `rejected`. Both are counted in `stats`.

    Args:
        source: The file.
        parse: Parses a row.
        stats: Counts the rows.
        rejected: The file of the rows that cannot be used.
        problem: Why a row cannot be used, or None; by default whether a trainer can use it.

    Raises:
        CaiError: The file cannot be read, a row is not valid, or every row was rejected.
    """

    def left_out(error: InvalidRow, raw: bytes) -> None:
        skip_unusable(error, raw)
        stats.rejected[reason_kind(error.reason)] += 1
        rejected.append([Rejected(key=f"line {error.line}", reason=error.reason, row=raw.decode(errors="replace"))])

    for _, row in read_rows(source, parse, left_out):
        if reason := problem(row):
            stats.rejected[reason] += 1
            rejected.append([reject(row.key, reason, row)])
        else:
            stats.add(row)
            yield row
    if not stats.rows:
        raise CaiError(
            f"all {stats.rejected.total():,} rows of {display_name(source)} were rejected "
            f"({', '.join(stats.rejected)})",
            code="all-rejected",
        )


def export(source: str, work: Path) -> dict[str, Any]:
    """Write the dataset of `source` into the new directory `work`, and the rows left out to `work/rejected.jsonl`.

    Returns:
        A summary: the number of `rows`, their `type` and the `columns`, and how many rows were `rejected`, by reason.

    Raises:
        CaiError: The file cannot be read, a row is not valid, or every row was rejected.
    """
    file = hash_input(source)
    row_type, parse = row_parser(source)
    (work / "data").mkdir(parents=True)
    stats, rejected, labels = DatasetStats(), AppendFile(work / REJECTED), LabelAudit()

    def rows() -> Iterator[dict[str, Any]]:
        for row in usable_rows(source, parse, stats, rejected):
            if isinstance(row, Preference):
                labels.add(row)
            yield row.model_dump()

    with closing(rejected):
        columns = _write_parquet(rows, features(row_type), work)
    manifest = read_manifest(sidecar(Path(source), "manifest.json"))
    audit = _audit(labels, source) if labels.rows > labels.human_only else None
    card = dataset_card(Path(source).name, row_type, columns, stats, manifest, file.sha256, audit)
    (work / "README.md").write_text(card, encoding="utf-8")
    counts = {"rejected": stats.rejected.total(), "rejected_reasons": dict(sorted(stats.rejected.items()))}
    return {"rows": stats.rows, "type": row_type.__name__, "columns": columns, **counts}


def _audit(labels: LabelAudit, source: str) -> AuditMetrics:
    """The audit of the exported labels and of the pairs that the judge left without a label."""
    for row in rejected_beside(source):
        labels.add(row)
    return labels.audit()


def _write_parquet(rows: Callable[[], Iterator[dict[str, Any]]], columns: Any, work: Path) -> list[str]:
    """Write the rows to a parquet file in `work` and return the names of the columns. Raises what `rows` raises."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        with TemporaryDirectory(dir=work, prefix="cache") as cache:
            data = Dataset.from_generator(rows, features=columns, cache_dir=cache)
            data.to_parquet(work / "data/train-00000-of-00001.parquet")
            return list(data.column_names)
    except Exception as error:  # `datasets` wraps what the generator raised
        if isinstance(error.__cause__, CaiError):
            raise error.__cause__ from None
        raise
    finally:
        enable_progress_bar()


def export_file(input: str, output: Path, *, overwrite: bool, write: Writer = export) -> dict[str, Any]:
    """Write the dataset directory `output` of the rows in `input` and return the summary.

    Args:
        input: The file of rows.
        output: The directory.
        overwrite: Whether to replace an exported dataset.
        write: Writes the dataset of a file into a new directory and returns the summary.

    Raises:
        CaiError: The output exists, or the rows cannot be read.
    """
    if input == "-":
        raise UsageError(
            "FILE cannot be stdin: it is read twice", hint="write it to a file first", code="invalid-option"
        )
    work = sidecar(output, "partial")
    with one_writer(output):
        if output.exists() and not overwrite:
            raise CaiError(
                f"{output} already exists", hint="--overwrite replaces it; or choose another -o", code="output-exists"
            )
        if output.exists() and not is_dataset(output):
            raise CaiError(
                f"{output} is not a dataset that cai exported",
                hint="remove it yourself, or choose another -o",
                code="not-made-by-cai",
            )
        shutil.rmtree(work, ignore_errors=True)
        try:
            summary = write(input, work)
            rejected = sidecar(output, REJECTED)
            rejected.unlink(missing_ok=True)
            if summary["rejected"]:
                os.replace(work / REJECTED, rejected)
            shutil.rmtree(output, ignore_errors=True)
            os.replace(work, output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {"output": str(output), **summary}


def is_dataset(directory: Path) -> bool:
    """Return whether a directory looks like something that `export` wrote."""
    kinds = ("data/*.parquet", "data/*.jsonl", "data/*.json", "data/*.eval", "dimensions/*.md")
    files = (file for kind in kinds for file in directory.glob(kind))
    return (directory / "README.md").is_file() and any(files)
