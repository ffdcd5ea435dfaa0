"""`cai batch`: a data stage's requests as the batch files of a provider, and back."""

from pathlib import Path
from typing import Annotated

import typer

from cai_cli.cli.expand import GroupedCommand, command_class, command_from
from cai_cli.common.errors import UsageError
from cai_cli.engines.batch.forms import Provider
from cai_cli.pipeline.registry import STAGES
from cai_cli.runtime.batch import collect, submit
from cai_cli.runtime.config import StageConfig
from cai_cli.runtime.stage import Stage

app = typer.Typer(help="Run a data stage on batch files of OpenAI, Anthropic or vLLM.", no_args_is_help=True)


@app.command("submit", cls=GroupedCommand, context_settings={"allow_interspersed_args": False})
def submit_command(
    command: Annotated[
        list[str], typer.Argument(metavar="STAGE...", help="The command of a data stage, without `cai`.")
    ],
    provider: Annotated[Provider, typer.Option("--for", help="Who answers the requests.", show_default=False)],
    batch_dir: Annotated[
        Path | None, typer.Option(help="Folder of the request files and answers; by default OUT.batch.")
    ] = None,
) -> None:
    """Write a stage's requests to files.

    STAGE...: a data stage with all its options, such as `sample prompts.jsonl -o out.jsonl --model openai:NAME`. No
    request is sent and no key is needed: the provider's commands for the files are printed.
    """
    stage, words = _stage(command)
    if config := _config(stage, words):
        submit(stage, config, provider, batch_dir)


@app.command("collect", cls=GroupedCommand)
def collect_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the batch, OUT.batch.")],
    results: Annotated[
        list[str] | None, typer.Argument(metavar="[RESULTS]...", help="Result and error files of the provider.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Write requests without a result to a new file, as after a lost batch.")
    ] = False,
) -> None:
    """Read result files, and complete the output of the stage.

    The files may come in any order, more than once, and in parts. Where the stage has further requests, such as the
    next round of a revision, they are written to a new file.
    """
    collect(folder, results or [], STAGES, again=again)


def _stage(command: list[str]) -> tuple[Stage, list[str]]:
    """The stage that a command line names, and its remaining words. Raises UsageError."""
    for length in (2, 1):
        if stage := STAGES.get(" ".join(command[:length])):
            return stage, command[length:]
    raise UsageError(f"{command[0]!r} is not a data stage", hint="such as sample or label-prefs", code="invalid-option")


def _config(stage: Stage, words: list[str]) -> StageConfig | None:
    """The options in the words of a stage's command line; None where they ask for help."""
    given: list[StageConfig] = []
    parser = typer.Typer(add_completion=False, rich_markup_mode=None)
    parser.command(stage.name, cls=command_class(stage.config))(command_from(stage.config, given.append))
    typer.main.get_command(parser).main(args=words, prog_name=f"cai batch submit {stage.name}", standalone_mode=False)
    return given[0] if given else None
