"""`cai export FILE -o DIR`: rows as a dataset directory, typed parquet and a card, that `datasets.load_dataset(DIR)`
and TRL's trainers read as it is.

Nothing is renamed on the way: samples and revisions are TRL's prompt-completion form, preferences its explicit-prompt
preference form, and the columns beside those stay.
"""

import os
import shutil
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import orjson
import typer

from cai_cli import __version__, console, options
from cai_cli.drawn import Drawn, drawn_counts, draws
from cai_cli.errors import CaiError, UsageError
from cai_cli.forms import parse_preference, parse_prompt
from cai_cli.jsonl import origin, read_rows, read_values, rows_of, shown
from cai_cli.manifest import hash_input, read_manifest
from cai_cli.outputs import one_writer, sidecar
from cai_cli.records import Critique, Preference, Prompt, Revision, Row, Sample

PAPER = "[Constitutional AI](https://arxiv.org/abs/2212.08073)"
USED_BY: Mapping[type[Row], str] = {
    Prompt: "TRL's RLOOTrainer and GRPOTrainer",
    Sample: "TRL's SFTTrainer",
    Revision: "TRL's SFTTrainer (`completion` is the last revision; `history` holds the rounds before)",
    Critique: "no trainer as it is: the replies are criticised, not revised",
    Preference: "TRL's RewardTrainer and DPOTrainer (hard labels; `p_chosen` is the soft one)",
}


def kind_of(source: str) -> tuple[type[Row], Callable[[object], Row]]:
    """The type of a file's rows and their parser, by the fields of its first row. Raises CaiError."""
    first: Any = next((value for _, value in read_values(source)), None)
    if first is None:
        raise CaiError(f"{shown(source)} holds no rows")
    fields = set(first) if isinstance(first, dict) else set()
    if {"reason", "row"} <= fields:
        raise CaiError(f"{source} holds rejected rows, which are no data", hint="export the file beside it")
    if {"chosen", "rejected"} <= fields:
        return Preference, lambda value: parse_preference(value, source=origin(source))
    for field_name, row_type in (("critique", Critique), ("history", Revision), ("sample_index", Sample)):
        if field_name in fields:
            return row_type, rows_of(row_type)
    return Prompt, lambda value: parse_prompt(value, source=origin(source))


def features(row_type: type[Row]) -> Any:
    """The columns of a row type as `datasets.Features`: typed even where every value is null or every list empty."""
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


@dataclass
class Seen:
    """What the card says about the rows, counted while they are written."""

    rows: int = 0
    principles: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0
    human: int = 0
    p_chosen: float = 0.0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.principles.update(draws(row))
        self.cut_off += isinstance(row, Sample) and row.finish_reason == "length"
        if isinstance(row, Preference):
            self.human += row.human is not None
            self.p_chosen += row.p_chosen

    def figures(self, row_type: type[Row]) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": self.rows}
        if issubclass(row_type, Sample):
            found["replies cut at the length limit"] = self.cut_off
        if row_type is Preference:
            found |= {"mean p_chosen": self.p_chosen / self.rows, "with a human label": self.human}
        return found


def export(source: str, work: Path) -> dict[str, Any]:
    """Write the dataset of `source` into the new directory `work`; returns a summary. Raises CaiError."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    file = hash_input(source)
    row_type, parse = kind_of(source)
    seen = Seen()

    def rows() -> Iterator[dict[str, Any]]:
        for _, row in read_rows(source, parse):
            seen.add(row)
            yield row.model_dump()

    (work / "data").mkdir(parents=True)
    disable_progress_bar()
    try:
        with TemporaryDirectory(dir=work, prefix="cache") as cache:
            data = Dataset.from_generator(rows, features=features(row_type), cache_dir=cache)
            data.to_parquet(work / "data/train-00000-of-00001.parquet")
            columns = list(data.column_names)
            del data
    except Exception as error:  # `datasets` wraps what the generator raised
        if isinstance(error.__cause__, CaiError):
            raise error.__cause__ from None
        raise
    finally:
        enable_progress_bar()
    manifest = read_manifest(sidecar(Path(source), "manifest.json"))
    card = dataset_card(Path(source).name, row_type, columns, seen, manifest, file.sha256)
    (work / "README.md").write_text(card, encoding="utf-8")
    return {"rows": seen.rows, "type": row_type.__name__, "columns": columns}


def dataset_card(
    name: str,
    row_type: type[Row],
    columns: list[str],
    seen: Seen,
    manifest: Mapping[str, Any] | None,
    sha256: str | None,
) -> str:
    """README.md of a dataset: what it is, the principles behind it, what made it, and the figures of its rows. It
    names no folder of this machine."""
    from huggingface_hub import DatasetCard, DatasetCardData

    head = DatasetCardData(
        tags=["constitutional-ai", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    parts = [
        f"# {cell(name)}",
        f"{row_type.__name__} rows, exported by cai {__version__}; {PAPER}. Read by {USED_BY[row_type]}.",
        f"Columns: {', '.join(f'`{column}`' for column in columns)}.",
        table("Figures", seen.figures(row_type)),
    ]
    if manifest:
        parts += [_principles(drawn_counts(seen.principles, manifest)), _made_by(manifest)]
    else:
        parts.append("No manifest says what made these rows.")
    if sha256:
        parts.append(f"sha256 of `{cell(name)}`: `{sha256}`")
    text = "\n\n".join(part for part in parts if part)
    return str(DatasetCard(f"---\n{head.to_yaml()}\n---\n\n{text}\n"))


def _principles(used: Drawn | None) -> str:
    if used is None:
        return ""
    rows = "".join(
        f"| `{cell(name)}` | {count:,} | {cell(_says(used, name))} |\n" for name, count in used.counts.items()
    )
    return (
        f"## Principles\n\nConstitution `{cell(used.constitution)}` (`{used.fingerprint}`).\n\n"
        f"| principle | drawn | what it asks |\n|---|---|---|\n{rows}"
    ).rstrip()


def _says(used: Drawn, name: str) -> str:
    principle = used.principles.get(name)
    texts = principle.model_dump(include={"critique", "revision", "comparison"}) if principle else {}
    return " / ".join(texts.values()) or "(its text is not at hand)"


def _made_by(manifest: Mapping[str, Any]) -> str:
    made = manifest["provenance"]
    model = {f"model, {key}": value for key, value in (made.get("model") or {}).items()}
    parts = [
        f"## What made it\n\n`cai {made['stage']}` {made['cai']}",
        table("", {**model, **{f"input `{k}`, sha256": v for k, v in made["input"].items() if v}}),
        table("Settings", made["settings"]),
        table("Rows in and out", {k: v for k, v in manifest["counts"].items() if not k.endswith("_reasons")}),
        table("Versions", manifest.get("run", {}).get("versions", {})),
    ]
    return "\n\n".join(part for part in parts if part)


def table(title: str, values: Mapping[str, Any]) -> str:
    """A two-column Markdown table under a heading; nothing of nothing."""
    if not values:
        return ""
    rows = "".join(f"| {cell(name)} | {cell(value)} |\n" for name, value in values.items())
    return (f"### {title}\n\n" if title else "") + f"| | |\n|---|---|\n{rows}".rstrip()


def cell(value: Any) -> str:
    """A value inside a Markdown table: one line, and no bar, markup or control character of its own."""
    text = f"{value:.6g}" if isinstance(value, float) else console.safe(str(value))
    for mark in "\\|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def command(
    input: Annotated[str, typer.Argument(metavar="FILE", help="JSONL file of rows.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the dataset.", show_default=False)],
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write rows as a dataset directory with a card, ready for TRL.

    FILE: Prompt, Sample, Critique, Revision or Preference rows, or pairs that humans labelled.
    """
    if input == "-":
        raise UsageError("FILE cannot be stdin: it is read twice", hint="write it to a file first")
    work = sidecar(output, "partial")
    with one_writer(output):
        if output.exists() and not overwrite:
            raise CaiError(f"{output} is there already", hint="--overwrite replaces it; or choose another -o")
        if output.exists() and not is_dataset(output):
            raise CaiError(f"{output} is no dataset that cai exported", hint="remove it yourself, or choose another -o")
        shutil.rmtree(work, ignore_errors=True)
        try:
            summary = export(input, work)
            shutil.rmtree(output, ignore_errors=True)
            os.replace(work, output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if json:
        print(orjson.dumps({"output": str(output), **summary}).decode())
    console.say(f"export: {summary['rows']:,} {summary['type']} rows -> {output}")


def is_dataset(directory: Path) -> bool:
    return (directory / "README.md").is_file() and any(directory.glob("data/*.parquet"))
