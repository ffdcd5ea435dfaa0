"""The `cai` command: registers the stages, turns a CaiError into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated, 141 the reader of stdout went away.
"""

import atexit
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from cai_cli import __version__
from cai_cli.cards import export
from cai_cli.cli import chat, doctor, models, principles, push, report, show
from cai_cli.cli.run import run_command
from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.evaluate import agreement, compare, harm, hhh
from cai_cli.metrics import dataset_stats
from cai_cli.phase1_supervised import critique, critique_revise, red_team, revise, sample, sft
from cai_cli.phase2_feedback import label_prefs, rl, score, train_pm
from cai_cli.runtime import merge, sort_dedup
from cai_cli.training import distributed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Constitutional AI from the shell: one subcommand a stage, JSONL in, JSONL out.",
)
PHASE_1 = "Phase 1, supervised"
PHASE_2 = "Phase 2, AI feedback"
FILES = "Files of rows"
ROAD = "The whole road, and around it"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cai {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


app.command("red-team", rich_help_panel=PHASE_1)(red_team.command)
app.command("sample", rich_help_panel=PHASE_1)(sample.command)
app.command("critique", rich_help_panel=PHASE_1)(critique.command)
app.command("revise", rich_help_panel=PHASE_1)(revise.command)
app.command("critique-revise", rich_help_panel=PHASE_1)(critique_revise.critique_revise_command)
app.command("sft", rich_help_panel=PHASE_1)(sft.command)
app.command("label-prefs", rich_help_panel=PHASE_2)(label_prefs.command)
app.command("train-pm", rich_help_panel=PHASE_2)(train_pm.command)
app.command("score", rich_help_panel=PHASE_2)(score.command)
app.command("rl", rich_help_panel=PHASE_2)(rl.command)
judging = typer.Typer(no_args_is_help=True, help="Judge labels and models.")
judging.command("agreement")(agreement.command)
judging.command("hhh")(hhh.command)
judging.command("compare")(compare.command)
judging.command("harm")(harm.command)
app.add_typer(judging, name="eval", rich_help_panel=ROAD)
app.command("run", rich_help_panel=ROAD)(run_command)
app.command("merge", rich_help_panel=FILES)(merge.command)
app.command("sort", rich_help_panel=FILES)(sort_dedup.sort_command)
app.command("dedup", rich_help_panel=FILES)(sort_dedup.dedup_command)
app.command("stats", rich_help_panel=FILES)(dataset_stats.command)
app.command("report", rich_help_panel=ROAD)(report.command)
app.command("show", rich_help_panel=FILES)(show.command)
app.command("chat", rich_help_panel=ROAD)(chat.command)
app.command("export", rich_help_panel=FILES)(export.command)
app.command("push", rich_help_panel=FILES)(push.command)
app.command("doctor", rich_help_panel=ROAD)(doctor.command)
app.add_typer(principles.app, name="principles", rich_help_panel=ROAD)
app.add_typer(models.app, name="models", rich_help_panel=ROAD)


def main() -> NoReturn:
    """Run the command line and exit. SIGTERM unwinds like an interrupt, so that files are left clean."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminated)
    atexit.register(_heed_no_more)
    _open_closed_streams()
    try:
        code = _run()
    except CaiError as error:
        console.error(error.message, error.hint)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        _give_up_stdout()
        code = 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        console.error(f"{where}{error.strerror or error}", "what is written is kept; mend it and run the same again")
        _give_up_stdout()
        code = 1
    except SystemExit as stop:
        code = stop.code
    except Exception:
        console.bug(traceback.format_exc())
        code = 1
    if distributed.world_size() > 1:
        distributed.leave(int(code or 0))
    sys.exit(code)


def _run() -> Any:
    """The command; returns its exit code, stdout flushed: what cannot be written is an error like others."""
    try:
        with distributed.session():
            app()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer would leave with 1
            raise stop.__context__ from None
        sys.stdout.flush()
        return stop.code
    return 0


def _open_closed_streams() -> None:
    """A stream that came closed (`>&-`) is none to Python, and the next file opened would get its number. Reading or
    writing rows there is to fail; messages have nowhere to go."""
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


def _give_up_stdout() -> None:
    """The interpreter would complain once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _heed_no_more() -> None:
    """All is said, written and closed: an interpreter that ends takes its handlers away, and a signal that came then
    would end it with another code."""
    for late in (signal.SIGINT, signal.SIGTERM):
        signal.signal(late, signal.SIG_IGN)


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)
