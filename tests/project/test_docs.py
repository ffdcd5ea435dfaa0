"""What is written down is true: README commands run, generated pages are current, the two quickstarts are one road."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_docs import render

from cai_cli.metrics.intervals import wilson
from cai_cli.pipeline.plan import plan
from cai_cli.pipeline.run_file import load_run

ROOT = Path(__file__).parents[2]


def readme_commands() -> list[str]:
    """Every command line of the README's `sh` blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("\n  | ", " | ").splitlines()
    return [line.partition("    #")[0].strip() for line in lines if line.strip()]


def run_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_cli_page_is_what_help_says() -> None:
    assert (ROOT / "docs/cli.md").read_text() == render(), "run `make docs`"


def test_the_shell_quickstart_is_the_yaml_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = Path("examples/quickstart.yaml")
    steps = plan(load_run(file), file, Path("runs/quickstart"))
    script = Path("examples/quickstart.sh").read_text().splitlines()
    assert [line for line in script if line.startswith("cai ")] == [step.shell for step in steps]


def test_the_readme_names_the_two_make_targets_and_they_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line for line in readme_commands() if line.startswith("make ")]
    assert targets == ["make demo", "make test"]
    for target in targets:
        assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE)


def test_every_promise_of_the_readme_names_tests_that_exist() -> None:
    promises = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What we promise")[2].partition("\n## ")[0]
    lines = re.split(r"\n- ", promises)[1:]
    assert len(lines) >= 10
    for line in lines:
        links = re.findall(r"\[[^]]+\]\(([^)]+)\)", line)
        assert links, line
        for link in links:
            assert (ROOT / link).name.startswith("test_")
            assert re.search(r"^(async )?def test_", (ROOT / link).read_text(), re.MULTILINE), link


def test_readme_commands_that_need_no_model_run() -> None:
    light = [c for c in readme_commands() if re.match(r"cai (principles|models|doctor|run .*--dry-run)", c)]
    assert len(light) == 7
    for command in light:
        done = run_shell(command, ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_stage_commands_run_on_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    heavy = [
        c
        for c in readme_commands()
        if re.match(
            r"cai (red-team|sample|critique|revise|sft|label-prefs|train-pm|score|rl|merge|sort|dedup|stats|report|show|export"
            r"|eval)",
            c,
        )
    ]
    assert len(heavy) == 26
    for command in heavy:
        done = run_shell(command, tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    made = {p.name for p in (tmp_path / "runs/readme").iterdir()}
    wanted = {"samples.jsonl", "preferences.jsonl", "sl-cai", "pm", "rl-cai", "piped", "merged.jsonl", "report.html"}
    assert wanted | {"dataset"} <= made


@pytest.mark.slow
def test_a_wheel_carries_the_principles_and_the_report_s_templates(tmp_path: Path) -> None:
    done = run_shell(f"pip wheel --quiet --no-deps -w {tmp_path} {ROOT}", ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    found = run_shell(
        f'PYTHONPATH={target} python -c "import cai_cli.constitution.schema as c; print(c.shipped_directory())"',
        tmp_path,
    )
    assert Path(found.stdout.strip()) == target / "cai_cli/principles", found.stderr
    assert {p.name for p in Path(found.stdout.strip()).iterdir()} == {"critique_revision.yaml", "preference.yaml"}
    templates = {p.name for p in (target / "cai_cli/report/templates").iterdir()}
    assert templates == {"page.html.j2", "macros.html.j2", "style.css", "script.js"}


def test_the_intervals_of_the_table_of_labels_are_wilsons_of_its_shares() -> None:
    table = (ROOT / "docs/labels.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?:HH-RLHF|HHH), n = (\d+) \|.* (\S+) \((\S+) to (\S+)\)( \*)? \| \S+ \|$", table, re.MULTILINE
    )
    assert len(rows) > 20
    for number, share, low, high, mark in rows:
        n = int(number)
        figure = wilson(round(2 * n * float(share)) / 2, n)  # a tie is half right
        assert figure is not None
        assert (float(low), float(high)) == pytest.approx((figure["low"], figure["high"]), abs=1.1e-3), (share, n)
        assert bool(mark) == (figure["low"] > 0.5 or figure["high"] < 0.5)
