"""`cai show FILE`: prints the rows of a JSONL file in readable form, in a pager on a terminal, as plain text elsewhere.

Row text is never interpreted: no markup, control character or bidirectional override of a row reaches the terminal.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import orjson
import typer
from rich.console import Console
from rich.text import Text

from cai_cli.cli import options
from cai_cli.common import console
from cai_cli.common.errors import InvalidRow, UsageError
from cai_cli.data.evaluation_schema import ModelComparison
from cai_cli.data.jsonl import Numbered, read_rows
from cai_cli.data.row_types import has_key, row_key, row_type_of
from cai_cli.data.schema import Critique, Rejected
from cai_cli.runtime.manifest import read_manifest
from cai_cli.runtime.output_files import sidecar

Json = Any
Block = tuple[str, str, str]  # label, text, style
JSONL = re.compile(r"\.jsonl(\.gz|\.zst)?$")
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


def blocks(row: Mapping[str, Json]) -> Iterator[Block]:
    """A row as labelled texts in reading order. Unknown fields are shown as JSON, so nothing is hidden."""
    left, row_type = dict(row), row_type_of(row)
    if row_type is Rejected and isinstance(row["row"], str):
        yield "rejected", str(left.pop("reason")), "red"
        yield from _original(left.pop("row"))
        left.pop("key", None)
    yield from _messages(left, "prompt")
    yield from _messages(left, "messages")
    votes = left.pop("votes", None) or []
    sides = ("chosen", "rejected")
    if row_type is ModelComparison:
        sides = (str(left.pop("model_a")), str(left.pop("model_b")))
        yield from _model_replies(left, sides)
    history = left.pop("history", None) or []
    for each in history:
        yield f"reply before round {each['round']}", f"{each['response']}", "cyan"
        if each["critique"] is not None:
            yield f"critique {each['round']} ({each['principle_id']})", each["critique"], "yellow"
        else:
            yield f"round {each['round']} ({each['principle_id']})", "revised without a critique", "yellow"
    if isinstance(left.get("completion"), list) and row_type is not Critique:
        name = f"revision {history[-1]['round']}" if history else "reply"
        yield name, _content(left.pop("completion")), "green"
    else:
        yield from _critique(left)
    yield from _preference(left)
    for vote in votes:
        yield "vote", _vote(vote, sides), "yellow"
    for name in ("id", "sample_index"):  # the heading has them
        left.pop(name, None)
    rest = [(name, v if isinstance(v, str) else orjson.dumps(v).decode()) for name, v in left.items() if v is not None]
    short = [f"{name} {value}" for name, value in rest if len(value) <= 60]
    yield from ((name, value, "dim") for name, value in rest if len(value) > 60)
    if short:
        yield "", " · ".join(short), "dim"


def _original(text: str) -> Iterator[Block]:
    """The original row of a rejected one."""
    try:
        yield from blocks(orjson.loads(text))
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        yield "row", text, "dim"


def _messages(left: dict[str, Json], name: str) -> Iterator[Block]:
    value = left.get(name)
    if isinstance(value, str):
        yield name, left.pop(name), "bold"
    elif isinstance(value, list):
        for message in left.pop(name):
            yield SPEAKERS.get(message["role"], message["role"]), message["content"], "bold"


def _critique(left: dict[str, Json]) -> Iterator[Block]:
    if (reply := left.pop("completion", None)) is not None:
        yield "reply", _content(reply), "cyan"
    if row_type_of(left) is Critique:
        yield f"critique {left.pop('round')} ({left.pop('principle_id')})", left.pop("critique"), "yellow"


def _preference(left: dict[str, Json]) -> Iterator[Block]:
    for name, style in (("chosen", "green"), ("rejected", "red")):
        if (reply := left.pop(name, None)) is not None:
            yield name, _content(reply), style


def _model_replies(left: dict[str, Json], models: tuple[str, str]) -> Iterator[Block]:
    """The replies of two models, each labelled with the model's name and score."""
    for side, model, style in zip("ab", models, ("green", "cyan"), strict=True):
        score = left.pop(f"score_{side}", None)
        yield model if score is None else f"{model} (score {score})", _content(left.pop(side)), style


def _content(value: Json) -> str:
    """A reply, given as messages or as text."""
    return "\n\n".join(message["content"] for message in value) if isinstance(value, list) else str(value)


def _vote(vote: Mapping[str, Json], sides: tuple[str, str]) -> str:
    """A vote on two replies. `sides` names them, in order "ab"."""
    first = sides[0] if vote["order"] == "ab" else sides[1]
    text = f"{vote['principle_id']}: {first} first, {vote['p_first']:.1%} for the first ({vote['method']})"
    return f"{text}\n{vote['rationale']}" if vote["rationale"] else text


def row_text(row: Json, line: int) -> Text:
    """One row, ready to print."""
    if not isinstance(row, dict):
        return Text.assemble((f"line {line}\n", "bold"), console.safe(orjson.dumps(row).decode()), "\n")
    text = Text()
    text.append(f"── {console.safe(name_of(row, line))} ", "bold blue").append("─" * 20 + "\n", "blue")
    try:
        labelled = list(blocks(row))
    except (KeyError, TypeError, AttributeError, ValueError):  # a known field with a value of another type
        labelled = [(str(name), orjson.dumps(value).decode(), "dim") for name, value in row.items()]
    for label, body, style in labelled:
        separator = "\n" if len(body) + len(label) > 90 or "\n" in body else "  " if label else ""
        text.append(console.safe(label), style).append(separator)
        text.append(console.safe(body), None if label else style).append("\n")
    return text


def name_of(row: Mapping[str, Json], line: int) -> str:
    """The key of a row as messages and manifests use it, or its line where it has none."""
    return row_key(row) if has_key(row) else f"line {line}"


def _names(row: Mapping[str, Json], line: int) -> tuple[Json, ...]:
    """The names by which `--id` finds a row."""
    return row.get("id"), row.get("prompt_id"), name_of(row, line)


class PipeConsole(Console):
    """A console that raises when its reader closes the pipe, instead of ending the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def pager() -> Iterator[Console]:
    """A console on $PAGER or `less` on a terminal; on stdout elsewhere, or where there is no pager."""
    if not sys.stdout.isatty():
        yield _plain(sys.stdout)
        return
    words = shlex.split(os.environ.get("PAGER", "less"))
    try:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, env={"LESS": "FRX", **os.environ})  # noqa: S603
    except (OSError, IndexError):
        yield PipeConsole(highlight=False)
        return
    stdin: Any = process.stdin
    try:
        yield PipeConsole(file=stdin, force_terminal=True, width=Console().width, highlight=False)
        stdin.close()
    except BrokenPipeError:
        pass  # the user left the pager
    finally:
        process.wait()


def _plain(file: TextIO) -> Console:
    return PipeConsole(file=file, force_terminal=False, no_color=True, highlight=False, soft_wrap=True)


def command(
    input: options.Input,
    n: Annotated[int | None, typer.Option("--n", "-n", "--limit", min=1, help="Stop after N rows.")] = None,
    grep: Annotated[str | None, typer.Option(help="Only rows that match this regular expression.")] = None,
    id: Annotated[
        str | None, typer.Option("--id", help="Only rows with this id, or of the prompt with this id.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Page through the rows of a JSONL file in readable form.

    INPUT: rows of any kind that cai writes, including rejected rows and metrics, or the run.json of `cai run`.
    """
    try:
        pattern = re.compile(grep, re.IGNORECASE) if grep else None
    except re.error as error:
        raise UsageError(f"--grep {grep!r} is not a regular expression: {error}", code="invalid-option") from None
    if input != "-" and Path(input).is_dir():
        raise _is_directory(Path(input))
    count, more = 0, False
    with pager() as out:
        if header := _header(input):
            out.print(Text(header, "dim"))
        for line, row in _rows(input):
            if id is not None and not (isinstance(row, dict) and id in _names(row, line)):
                continue
            text = row_text(row, line)
            if pattern and not pattern.search(text.plain):
                continue
            if count == n:
                more = True
                break
            out.print(text)
            count += 1
    console.say(f"show: {count:,} rows{'; more follow (--n)' if more else ''}")


def _rows(source: str) -> Iterator[Numbered[Json]]:
    """The rows of the file. The last line of an unfinished output may be torn; it is not shown."""
    torn: list[InvalidRow] = []

    def stop_unless_last(error: InvalidRow, _raw: bytes) -> None:
        if torn or not source.endswith(".partial"):
            raise error
        torn.append(error)

    for numbered in read_rows(source, lambda value: value, stop_unless_last):
        if torn:
            raise torn[0]
        yield from _steps(numbered)


def _steps(numbered: Numbered[Json]) -> Iterator[Numbered[Json]]:
    """The steps in the record of a `cai run` (run.json), each as a row; any other row as it is."""
    line, row = numbered
    steps = row.get("steps") if isinstance(row, dict) and "id" not in row else None
    if not (isinstance(steps, dict) and all(isinstance(step, dict) and "argv" in step for step in steps.values())):
        yield numbered
        return
    planned = {name: {"argv": argv, "status": "not started"} for name, argv in (row.get("planned") or {}).items()}
    for name, step in (planned | steps).items():
        shown = {key: step.get(key) for key in ("status", "seconds", "labels")}
        yield line, {"id": name, "command": shlex.join(["cai", *step["argv"]]), **shown}


def _is_directory(path: Path) -> UsageError:
    """The error for a directory; its hint names the files in it that can be shown."""
    files = sorted(str(file) for file in path.iterdir() if JSONL.search(file.name))
    kind = "the directory of a model" if (path / "config.json").is_file() else "a directory"
    return UsageError(
        f"{path} is {kind}, not a JSONL file",
        hint=f"name a file in it: {', '.join(files)}" if files else None,
        code="cannot-read",
    )


def _header(source: str) -> str | None:
    """One line about how the file was made, if it has a manifest."""
    manifest = None if source == "-" else read_manifest(sidecar(Path(source), "manifest.json"))
    if not manifest:
        return None
    counts = manifest.get("counts")
    if counts is None:
        stage = manifest["provenance"]["stage"]
        return console.safe(f"{source}: an unfinished output of cai {stage}; the same command completes it\n")
    return console.safe(
        f"{source}: made by cai {manifest['provenance']['stage']}, {counts['in']:,} in = {counts['out']:,} out + "
        f"{counts['rejected']:,} rejected + {counts['skipped']:,} skipped\n"
    )
