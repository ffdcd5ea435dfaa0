"""The `cai` command: builds the command line from the registry, and turns an error into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 invalid usage, 130 interrupted, 143 terminated, 141 stdout closed by its reader.
"""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cai_cli import __version__
from cai_cli.cli import (
    agreement,
    batch,
    chat,
    doctor,
    files,
    lm_eval,
    models,
    principles,
    publish,
    report,
    run,
    serve_reward,
    show,
)
from cai_cli.cli.expand import GroupedCommand, command_class, command_from, stage_command
from cai_cli.common import console, threads
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.library_errors import is_of_a_file, library_failure
from cai_cli.pipeline import registry
from cai_cli.runtime import convert
from cai_cli.runtime.stage import Phase
from cai_cli.training import distributed


class Heading(StrEnum):
    """The headings of `cai --help` besides those of stages."""

    PIPELINE = "Pipelines"
    FILES = "Files of rows"
    MODELS = "Models, principles and this machine"


class GroupedCommands(TyperGroup):
    """A group whose `--help` lists commands under headings, each with its whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            summary = (command.help or "").strip().partition("\n")[0]
            sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, summary))
        widest = max(len(name) for rows in sections.values() for name, _ in rows)
        for heading, rows in sorted(sections.items(), key=lambda section: _ORDER.get(section[0], 0)):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(widest), summary) for name, summary in rows])


_ORDER = {heading.value: place for place, heading in enumerate((*Phase, *Heading))}


def _version(requested: bool) -> None:
    if requested:
        print(f"cai {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def build_app() -> typer.Typer:
    """Build the command line: one command for each stage of the registry, and the commands that are not stages."""
    settings: dict[str, Any] = {
        "no_args_is_help": True,
        "pretty_exceptions_enable": False,
        "rich_markup_mode": None,
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    app = typer.Typer(
        cls=GroupedCommands,
        help=_HELP,
        **settings,
    )
    app.callback()(_root)
    evaluation = typer.Typer(cls=GroupedCommands, add_completion=False, help=_EVAL_HELP, **settings)
    for stage in registry.STAGES.values():
        group, _, name = stage.name.rpartition(" ")
        target = evaluation if group == "eval" else app
        panel = None if group else stage.phase.value
        target.command(name, cls=command_class(stage.config), rich_help_panel=panel)(stage_command(stage))
    evaluation.command("agreement", cls=GroupedCommand)(agreement.command)
    evaluation.command("lm-eval", cls=GroupedCommand)(lm_eval.command)
    app.add_typer(evaluation, name="eval", rich_help_panel=Phase.EVALUATION.value)
    for heading, commands in _OTHERS.items():
        for name, command in commands.items():
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name, rich_help_panel=heading.value)
            else:
                app.command(name, cls=GroupedCommand, rich_help_panel=heading.value)(command)
    return app


_HELP = "Constitutional AI from the shell: one subcommand per stage, JSONL in, JSONL out."
_EVAL_HELP = "Evaluate labels and models: agreement, hhh, compare, harm, refusals, adherence, bench, lm-eval."
_OTHERS: dict[Heading, dict[str, Callable[..., None] | typer.Typer]] = {
    Heading.PIPELINE: {"run": command_from(run.RunConfig, run.run), "batch": batch.app, "report": report.command},
    Heading.FILES: {
        "convert": command_from(convert.ConvertConfig, convert.run, writes_rows=True),
        "show": show.command,
        "stats": files.stats_command,
        "merge": files.merge_command,
        "sort": files.sort_command,
        "dedup": files.dedup_command,
        "export": publish.export_command,
        "push": publish.push_command,
    },
    Heading.MODELS: {
        "chat": command_from(chat.ChatConfig, chat.run),
        "models": models.app,
        "principles": principles.app,
        "serve-reward": command_from(serve_reward.ServeRewardConfig, serve_reward.run),
        "doctor": doctor.command,
    },
}


def main() -> NoReturn:
    """Run the command line and exit. SIGTERM unwinds like an interrupt, so that outputs are closed properly."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads.configure()
    os.environ["PYTHONSAFEPATH"] = "1"  # no Python that this one starts runs a file of the working folder as a library
    signal.signal(signal.SIGTERM, _terminated)
    atexit.register(_ignore_late_signals)
    _open_closed_streams()
    try:
        code = _run()
    except CaiError as error:
        console.error(error.message, error.hint)
        if not error.in_summary:
            _print_json(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = _report(error)
    if distributed.world_size() > 1:
        distributed.leave(int(code or 0))
    sys.exit(code)


def _report(error: Exception) -> int:
    """Print an error that is not a CaiError, and return the exit code."""
    failure = library_failure(error)
    if isinstance(error, BrokenPipeError) and failure is None:
        _abandon_stdout()
        return 141
    if isinstance(error, OSError) and (failure is None or is_of_a_file(error)):
        where = f"{error.filename}: " if error.filename else ""
        failure = CaiError(
            f"{where}{error.strerror or error}",
            "the rows written so far are kept; fix the cause and run the same command again",
            code="failed",
        )
        console.error(failure.message, failure.hint)
        with suppress(OSError):  # stdout may be what failed
            _print_json(failure)
        _abandon_stdout()
    elif failure:
        console.error(failure.message, failure.hint)
        _print_json(failure)
    else:
        console.bug("".join(traceback.format_exception(error)))
        _print_json(CaiError(f"{type(error).__name__}: {error}", "please report this bug in cai", code="bug"))
    return 1


def _run() -> Any:
    """Run the command and return its exit code. Flushes stdout, so that a failed write is an error like others."""
    trainers = frozenset(stage.name for stage in registry.STAGES.values() if stage.trains)
    try:
        with distributed.session(trainers):
            build_app()()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer would exit with 1
            raise stop.__context__ from None
        if format_message := getattr(stop.__context__, "format_message", None):  # typer has printed its usage error
            code = _USAGE_CODES.get(type(stop.__context__).__name__, "usage")
            _print_json(UsageError(format_message(), code=code))
        sys.stdout.flush()
        return stop.code
    return 0


_USAGE_CODES = {
    "NoSuchOption": "unknown-option",
    "MissingParameter": "missing-option",
    "BadParameter": "invalid-option",
}


def _print_json(error: CaiError) -> None:
    """Print the error as one JSON object where the command line has `--json`."""
    if "--json" in sys.argv[1:]:
        console.error_json(error.as_json())


def _open_closed_streams() -> None:
    """Open the standard streams that the shell closed (`>&-`), so that no file opened later gets their number.

    Rows cannot be read or written there; messages are discarded.
    """
    if sys.stdin is None:
        sys.stdin = _null(0, os.O_WRONLY, "r")
    if sys.stdout is None:
        sys.stdout = _null(1, os.O_RDONLY, "w")
    if sys.stderr is None:
        sys.stderr = _null(2, os.O_WRONLY, "w")


def _null(number: int, flags: int, mode: str) -> Any:
    fd = os.open(os.devnull, flags)
    if fd != number:
        os.dup2(fd, number)
        os.close(fd)
    return open(number, mode, encoding="utf-8", closefd=False)


def _abandon_stdout() -> None:
    """Redirect stdout to the null device, because the interpreter would fail again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ignore_late_signals() -> None:
    """Ignore signals during shutdown, so that a late SIGTERM cannot change the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)
