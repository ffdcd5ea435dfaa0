"""`cai eval agreement`."""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cli import options
from cai_cli.evaluate.agreement import print_audit
from cai_cli.metrics.label_audit import audit_file
from cai_cli.runtime.manifest import write_json


def command(
    input: options.Input,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the metrics to this JSON file.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Audit labels: order flips, position bias, agreement.

    INPUT: Preference rows, from `cai label-prefs`. The rejected rows of the same run are counted too.
    """
    options.refuse_existing(output, overwrite)
    audit = audit_file(input)
    if output:
        write_json(output, audit)
    if json:
        print(orjson.dumps(audit).decode())
    else:
        print_audit(audit)
