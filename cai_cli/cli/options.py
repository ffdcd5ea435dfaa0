"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from cai_cli.common import console


def _quiet(quiet: bool) -> bool:
    console.set_quiet(quiet)
    return quiet


DEFAULT_MODEL = "smollm2-135m"
Input = Annotated[str, typer.Argument(metavar="INPUT", help="JSONL file, or - for stdin.", show_default=False)]
Output = Annotated[str, typer.Option("--output", "-o", help="Output JSONL file, or - for stdout.", show_default=True)]
ModelOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Directory of the finished model.", show_default=False)
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Directory, Hub name, alias (see `cai models list`), openai:NAME with --base-url, vllm:NAME or "
        "scripted:FILE.",
    ),
]
PreferenceModel = Annotated[
    str, typer.Option("--pm", help="The preference model, from `cai train-pm`.", show_default=False)
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Every draw comes from this, the stage and the row.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the input.")]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid", "--skip-bad", help="Go on past lines that are no rows; they are kept in the rejected file."
    ),
]
MaxInvalid = Annotated[
    int | None,
    typer.Option("--max-invalid", "--max-bad", min=0, help="Stop when more than N lines are bad, with --skip-invalid."),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Only the Ith of N parts of the input, by prompt id (see `cai merge`)."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start afresh, replacing what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the closing summary as one JSON object.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_quiet, help="No progress, no messages; errors and warnings only.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows asked at once; by default fitted to the device.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16; auto is float32 on CPU.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        help="Address of the OpenAI-compatible server of an openai: model, as http://HOST:PORT/v1; the key comes from "
        "OPENAI_API_KEY."
    ),
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Requests to the server at once; by default 16.")
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.1, help="Seconds for one request to the server, its retries included; by default 600."),
]
BudgetTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Stop, resumably, when this output has taken so many tokens of the server."),
]
PriceIn = Annotated[float | None, typer.Option(min=0.0, help="Price of a million prompt tokens, to count the cost.")]
PriceOut = Annotated[float | None, typer.Option(min=0.0, help="Price of a million new tokens, to count the cost.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; 1 keeps the whole distribution.")]
Constitution = Annotated[
    str | None, typer.Option("--constitution", help="YAML file of principles; by default the shipped one.")
]
FewShot = Annotated[
    str | None,
    typer.Option("--few-shot", help="YAML file with examples, or `none`; by default those of the constitution."),
]
Principles = Annotated[str | None, typer.Option("--principles", help="Only these principle ids, separated by commas.")]
MaxPrinciples = Annotated[int | None, typer.Option(min=1, help="Only the first K principles (paper section 3.4).")]
PromptFormatOption = Annotated[
    str,
    typer.Option(
        "--prompt-format",
        "--prompt-form",
        help="auto, chat (chat template) or raw (text for base models); auto asks the model.",
    ),
]
