"""Shell completion: what `cai --install-completion` installs completes commands and options in bash; zsh and fish get
their own scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPLETE = """\
source ~/.bashrc
read -ra registered <<< "$(complete -p cai)"  # complete -o ... -F FUNCTION cai
COMP_WORDS=(cai "$@")
COMP_CWORD=$#
"${registered[-2]}" cai
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A new home, and `cai` on the PATH as pip installs it."""
    program = tmp_path / "bin/cai"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom cai_cli.cli.app import main\n\nmain()\n")
    program.chmod(0o755)
    return {**os.environ, "HOME": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}


def bash(script: str, *words: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_completion_installed_for_bash_completes_commands_and_options(environment: dict[str, str]) -> None:
    # The command after it keeps bash from replacing itself by `cai`, which looks for the shell among its parents.
    assert "bash completion installed" in bash("cai --install-completion && true", environment=environment)
    assert bash(COMPLETE, "sam", environment=environment).split() == ["sample"]
    assert bash(COMPLETE, "sample", "--max-n", environment=environment).split() == ["--max-new-tokens"]
    assert bash(COMPLETE, "eval", "h", environment=environment).split() == ["hhh", "harm"]


@pytest.mark.parametrize(("shell", "registration"), [("zsh", "#compdef cai"), ("fish", "complete --command cai")])
def test_other_shells_get_a_script_that_completes_commands(
    shell: str, registration: str, environment: dict[str, str]
) -> None:
    def cai(**variables: str) -> str:
        return bash("cai", environment=environment | variables)

    assert registration in cai(_CAI_COMPLETE=f"source_{shell}")
    request = {"_TYPER_COMPLETE_ARGS": "cai sam", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "sample" in cai(_CAI_COMPLETE=f"complete_{shell}", **request)
