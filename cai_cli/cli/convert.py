"""`cai convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.runtime.convert import Conversion, Target, convert_file
from cai_cli.runtime.output_files import is_stdout
from cai_cli.runtime.shared_options import KindChoice


def command(
    input: options.Input,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output JSONL file.", show_default=False)],
    to: Annotated[Target, typer.Option(help="Rows to write; auto takes what the first row holds.")] = Target.AUTO,
    prompts: Annotated[
        str | None, typer.Option(help="Requests or prompts of a batch result, joined by custom_id or id.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column that holds the prompt, or PART=NAME,PART=NAME.", metavar="NAME")
    ] = None,
    soft_from: Annotated[
        str | None,
        typer.Option(help="Labels from the scores NAME_chosen and NAME_rejected of a pair.", metavar="NAME"),
    ] = None,
    kind: Annotated[KindChoice | None, typer.Option(help="Kind of the prompts that have no `kind`.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N rows of the input.")] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Skip invalid lines; they are written to OUT.rejected.jsonl.")
    ] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert rows of other tools to rows of cai.

    INPUT: conversations (`messages`, ShareGPT, LMSYS, Alpaca, questions and answers, prompts with completions), pairs
    (HH-RLHF, UltraFeedback, replies beside their prompt), or results of OpenAI's and Anthropic's batch files with
    --prompts; as JSONL, one JSON array, printed JSON, CSV, TSV, parquet, hf://datasets/OWNER/NAME?config=C&split=S, or
    plain text. Prints what was read, left out and rejected.
    """
    console.set_rows_on_stdout(is_stdout(str(output)))
    chosen: Any = kind.value if kind else None
    convert_file(
        input,
        output,
        Conversion(to, column, soft_from, chosen, limit),
        prompts=prompts,
        skip_invalid=skip_invalid,
        overwrite=overwrite,
        as_json=json,
    )
