"""The command line itself: light imports, help, and one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import Cai

from cai_cli import __version__
from cai_cli.cli.app import build_app

HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "pyarrow", "huggingface_hub", "numpy")
COMMANDS = sorted(typer.main.get_command(build_app()).commands)  # type: ignore[attr-defined]


def test_help_and_a_scripted_stage_load_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    (tmp_path / "script.jsonl").write_text('{"replies": ["hi"]}\n')
    for words in (["--help"], ["sample", "--help"], ["sample", "p.txt", "--model", "scripted:script.jsonl"]):
        code = (
            f"import sys; sys.argv = ['cai', *{words!r}]\n"
            "from cai_cli.cli.app import main\n"
            "try: main()\n"
            f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]", words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, cai: Cai) -> None:
    for flag in ("--help", "-h"):
        done = cai(command, flag)
        assert (done.code, done.stderr) == (0, "")
        assert f"cai {command}" in done.stdout


def test_the_version_is_printed(cai: Cai) -> None:
    assert cai("--version").stdout == f"cai {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["smaple"],
        ["sample"],
        ["sample", "in.jsonl", "--no-such-option"],
        ["sample", "in.jsonl", "--n", "0"],
        ["sample", "in.jsonl", "--n", "two"],
        ["sample", "in.jsonl", "--temperature", "-1"],
        ["sample", "in.jsonl", "--top-p", "1.5"],
        ["sample", "in.jsonl", "--limit", "0"],
        ["sample", "in.jsonl", "--kind", "evil"],
        ["sample", "in.jsonl", "--device", "tpu", "--model", "."],
        ["sample", "in.jsonl", "--dtype", "int1", "--model", "."],
        ["sample", "in.jsonl", "--prompt-format", "html", "--model", "scripted:script.jsonl"],
        ["critique-revise", "in.jsonl", "--rounds", "-1"],
    ],
)
def test_an_invalid_command_line_exits_with_two(words: list[str], cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "script.jsonl").write_text('{"replies": ["hi"]}\n')
    done = cai(*words)
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_option_is_named_with_what_it_is_for(cai: Cai) -> None:
    done = cai("score", "in.jsonl", "-o", "out.jsonl", "--pm-url", "http://localhost:8000/classify")
    assert done.code == 2
    assert "'--pm'. Preference model" in done.stderr
    assert "server:NAME" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "none.jsonl", "--model", "scripted:script.jsonl"], "cannot read none.jsonl: No such file"),
        (["sample", ".", "--model", "scripted:script.jsonl"], "cannot read .: Is a directory"),
        (["sample", "in.jsonl", "--model", "scripted:none.jsonl"], "cannot read none.jsonl"),
        (["sample", "in.jsonl", "--model", "scripted:empty.jsonl"], "empty.jsonl holds no scripted answers"),
        (
            ["sample", "in.jsonl", "--model", "scripted:in.jsonl"],
            "in.jsonl:1: not a ScriptLine row: unknown field 'prompt'",
        ),
        (["critique", "in.jsonl", "--model", "scripted:script.jsonl", "--constitution", "none.yaml"], "none.yaml"),
        (["critique", "in.jsonl", "--model", "scripted:script.jsonl"], "in.jsonl:1: not a Sample row"),
    ],
)
def test_a_failure_is_one_line_and_exits_with_one(words: list[str], message: str, cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "script.jsonl").write_text('{"replies": ["hi"]}\n')
    (tmp_path / "empty.jsonl").write_text("")
    done = cai(*words)
    assert done.code == 1
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert all(line.startswith("hint: ") for line in rest)
