"""`cai principles list|show|validate|import|rank|learn`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import orjson
import typer

from cai_cli.cli import options
from cai_cli.cli.expand import GroupedCommand, command_class, command_from
from cai_cli.common.console import safe, say
from cai_cli.common.errors import CaiError
from cai_cli.constitution import schema
from cai_cli.metrics.principle_ranking import rank_files
from cai_cli.metrics.ranking_table import ranking_lines
from cai_cli.phase2_feedback.learn_principles import LearnConfig
from cai_cli.phase2_feedback.learn_principles import run as run_learn
from cai_cli.prompting.paper_import import import_published
from cai_cli.runtime.manifest import write_json

app = typer.Typer(no_args_is_help=True, help="List, show, validate, import, rank and learn principles.")
Files = Annotated[list[str] | None, typer.Argument(help="YAML files; by default the shipped ones.", show_default=False)]


def _files(files: Sequence[str] | None) -> list[str]:
    return list(files) if files else [str(schema.shipped_directory() / name) for name in schema.SHIPPED.values()]


def _texts(principle: schema.CritiquePrinciple | schema.PreferencePrinciple) -> list[tuple[str, str]]:
    names = ("critique", "revision", "comparison")
    return [(name, value) for name in names if (value := principle.model_dump().get(name))]


@app.command("list")
def list_command(files: Files = None, json: options.Json = False) -> None:
    """List principles: kind, id and theme."""
    loaded = [schema.load(file) for file in _files(files)]
    if json:
        rows = [{"kind": c.kind, **p.model_dump()} for c in loaded for p in c.principles]
        print(orjson.dumps(rows).decode())
        return
    for c in loaded:
        for p in c.principles:
            print(safe(f"{c.kind:<18} {p.id:<28} {p.theme or ''}".rstrip()))


@app.command()
def show(
    ids: Annotated[list[str] | None, typer.Argument(help="Principle ids; all by default.", show_default=False)] = None,
    constitution: Annotated[
        list[str] | None, typer.Option("--constitution", help="YAML file; by default the shipped ones.")
    ] = None,
) -> None:
    """Print principles in full."""
    printed = set()
    for file in _files(constitution):
        for p in schema.load(file).principles:
            if ids and p.id not in ids:
                continue
            printed.add(p.id)
            print(safe(p.id + (f"  [{p.theme}]" if p.theme else "")))
            for name, text in _texts(p):
                print(safe(f"  {name}: {text}"))
    if missing := [i for i in ids or [] if i not in printed]:
        raise CaiError(
            f"no principle {missing[0]!r}", hint="`cai principles list` lists them", code="unknown-principle"
        )


@app.command()
def validate(files: Files = None) -> None:
    """Check YAML files and print what each contains."""
    for file in _files(files):
        c = schema.load(file)
        print(f"{file}: ok, {c.kind}, {len(c.principles)} principles, {len(c.examples)} examples")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="A JSON file published with the paper, unchanged.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write.", show_default=False)],
    overwrite: options.Overwrite = False,
) -> None:
    """Convert the paper's principles or few-shot prompts to YAML.

    Takes CritiqueRevisionInstructions.json, CritiqueRevisionFewShotPrompts.json, RLMadisonInstructions.json,
    RLMadisonFewShotPrompts.json and RLMadisonPrecogFewShotPrompts.json, recognised by content. No text is lost.
    """
    options.refuse_existing(output, overwrite)
    imported = import_published(file)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(schema.dump(imported), encoding="utf-8")
    except OSError as error:
        raise CaiError(f"cannot write {output}: {error.strerror}", code="cannot-write") from error
    if schema.load(output) != imported:
        raise AssertionError(f"{output} reads back as a different constitution")
    say(f"{output}: {imported.kind}, {len(imported.principles)} principles, {len(imported.examples)} examples")


@app.command(cls=GroupedCommand)
def rank(
    labels: Annotated[
        str, typer.Argument(metavar="LABELS", help="Preference rows with votes, or - for stdin.", show_default=False)
    ],
    human: Annotated[
        str | None, typer.Option("--human", help="File of the same pairs with human labels, for rows without one.")
    ] = None,
    panel: Annotated[
        list[str] | None,
        typer.Option("--panel", help="File of the labels of another judge of the same pairs; can be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the metrics to this JSON file.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rank principles by what their votes contribute: agreement, order flips, information added.

    LABELS: Preference rows of `cai label-prefs`, best with several principles on each pair (--principles-per-pair). The
    rejected rows of the same run count too. Pairs are matched between files by their texts.
    """
    options.refuse_existing(output, overwrite)
    ranking = rank_files(labels, human, panel or ())
    if output:
        write_json(output, ranking)
    if json:
        print(orjson.dumps(ranking).decode())
    else:
        print("\n".join(ranking_lines(ranking)))


app.command("learn", cls=command_class(LearnConfig))(command_from(LearnConfig, run_learn))
