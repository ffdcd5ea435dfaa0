"""`cai stats`, `merge`, `sort` and `dedup`."""

from pathlib import Path
from typing import Annotated

import typer

from cai_cli.cli import options
from cai_cli.metrics.dataset_stats import print_stats
from cai_cli.runtime.merge import merge_shards
from cai_cli.runtime.sort_dedup import SortBy, dedup_file, sort_file

Output = Annotated[Path, typer.Option("--output", "-o", help="Output JSONL file.", show_default=False)]


def stats_command(
    input: options.Input,
    tokenizer: Annotated[
        str | None, typer.Option(help="Count tokens of this model's tokenizer instead of characters.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Print counts, lengths and duplicates of a JSONL file.

    INPUT: rows of any stage, or any JSONL. Counts rows, invalid lines, duplicates, kinds, sources, reasons, rounds and
    principles; prints quantiles of text lengths and the histogram of p_chosen.
    """
    print_stats(input, tokenizer, as_json=json)


def merge_command(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="All shards of one run.")],
    output: Output,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge the shards of one run.

    SHARD...: outputs of the same command with --shard 1/N to N/N. Rows, rejected rows, counts and provenance equal
    those of a run without --shard, byte for byte. A missing shard, or a shard of another run, is an error.
    """
    merge_shards(shards, output, overwrite=overwrite, as_json=json)


def sort_command(
    input: options.Input,
    output: Output,
    by: Annotated[
        SortBy, typer.Option(help="Sort by id, which groups the rows of a prompt, or by length in characters.")
    ] = SortBy.id,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Sort rows without loading the file.

    INPUT: JSONL rows of any stage. Rows with equal keys keep their order.
    """
    sort_file(input, output, by, overwrite=overwrite, as_json=json)


def dedup_command(
    input: options.Input,
    output: Output,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Keep the first row of each prompt.

    INPUT: JSONL rows with prompts in any format that `cai sample` takes. The first row of each prompt is written
    unchanged. The file is never loaded as a whole.
    """
    dedup_file(input, output, overwrite=overwrite, as_json=json)
