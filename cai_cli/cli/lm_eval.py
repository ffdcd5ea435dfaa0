"""`cai eval lm-eval`."""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.evaluate.lm_eval import ENDING, run_lm_eval
from cai_cli.models.names import public_name
from cai_cli.runtime.manifest import write_json


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory, Hub name or alias, or BASE+ADAPTER for a LoRA adapter.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGS...", help="Arguments of `lm_eval run`, after two dashes.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"File of the results, which ends in {ENDING}; by default MODEL{ENDING}."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the model in the report.")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a model with lm-evaluation-harness.

    Passes ARGS through to `lm_eval run` and keeps its JSON. Written into the folder of a run, `cai report` draws the
    results of several models side by side. Needs `pip install '.[bench]'`.
    """
    path = output or Path(f"{name or public_name(model)}{ENDING}".replace("/", "-"))
    if not path.name.endswith(ENDING):
        raise UsageError(f"{path} does not end in {ENDING}", hint=f"-o RUN/NAME{ENDING}", code="invalid-option")
    options.refuse_existing(path, overwrite)
    results = run_lm_eval(model, arguments or [], name)
    write_json(path, results)
    if json:
        print(orjson.dumps(results).decode())
    console.say(f"lm-eval: {', '.join(results['results'])} -> {path}")
