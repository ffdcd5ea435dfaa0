"""`cai export` and `cai push`."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cards.annotated_pairs import export_annotated_pairs
from cai_cli.cards.export import Writer, export, export_file
from cai_cli.cards.inspect_log import export_inspect
from cai_cli.cards.other_trainers import export_openrlhf, export_verl
from cai_cli.cards.petri import export_petri
from cai_cli.cards.push import push
from cai_cli.cli import options
from cai_cli.common import console


class Tool(StrEnum):
    """A tool that `cai export` writes files for."""

    OPENRLHF = "openrlhf"
    VERL = "verl"
    FEEDBACK_FORENSICS = "feedback-forensics"
    INSPECT = "inspect"
    PETRI = "petri"


_WRITERS: Mapping[Tool | None, Writer] = {
    None: export,
    Tool.OPENRLHF: export_openrlhf,
    Tool.VERL: export_verl,
    Tool.FEEDBACK_FORENSICS: export_annotated_pairs,
    Tool.INSPECT: export_inspect,
    Tool.PETRI: export_petri,
}


def export_command(
    input: Annotated[
        str, typer.Argument(metavar="FILE", help="JSONL file of rows; a constitution for Petri.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    tool: Annotated[
        Tool | None,
        typer.Option("--for", help="Write the format of another tool; by default that of TRL."),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write rows as a dataset with a card, for TRL, OpenRLHF or verl; as annotated pairs for Feedback Forensics; as a
    log that `inspect view` opens; or the principles of a constitution as an audit by Petri.

    FILE: Prompt, Sample, Critique, Revision or Preference rows, or rows in any format that `cai convert` reads. Inspect
    also shows the rows of `cai score` and `cai eval`.
    """
    summary = export_file(input, output, overwrite=overwrite, write=_WRITERS[tool])
    if json:
        print(orjson.dumps(summary).decode())
    left_out = "".join(f", {count:,} left out ({reason})" for reason, count in summary["rejected_reasons"].items())
    console.say(f"export: {summary['rows']:,} {summary['type']} rows{left_out} -> {output}")


def push_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Exported dataset or finished model.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; by default it is private.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload a dataset or a model to the Hugging Face Hub.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from huggingface_hub import HfApi

    url = push(directory, repo, public=public, api=HfApi())
    if json:
        print(orjson.dumps({"repo": repo, "directory": str(directory), "public": public, "commit": url}).decode())
    console.say(f"push: {directory} -> {url}")
