"""The documentation is true: its commands run, its links and names exist, and its generated pages are current."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cli_docs import render
from conftest import Cai
from forked import Forks

from cai_cli import __version__
from cai_cli.cli.app import build_app
from cai_cli.metrics.intervals import wilson
from cai_cli.pipeline.estimate import estimate
from cai_cli.pipeline.plan import plan
from cai_cli.pipeline.registry import STAGES
from cai_cli.pipeline.run_file import load_run

ROOT = Path(__file__).parents[2]
# docs/cli.md is generated. Commands run in this order: those of docs/evaluation.md use the outputs of docs/stages.md.
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")} - {ROOT / "docs/cli.md"},
    key=lambda page: (page.name != "README.md", page.name != "stages.md", page),
)
LIGHT = re.compile(r"cai (principles|models|doctor|run .*--dry-run)")


def blocks(page: Path, language: str) -> list[str]:
    """The command lines of a page's code blocks in `language`, continuation lines joined, comments cut off."""
    text = "".join(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    lines = text.replace("\\\n", " ").replace("\n  | ", " | ").splitlines()
    return [line.partition("   #")[0].strip() for line in lines if line.strip()]


def commands() -> list[str]:
    """The commands of all `sh` blocks, in reading order."""
    return [line for page in PAGES for line in blocks(page, "sh")]


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def cli_commands(command: Any, path: str = "cai") -> Iterator[tuple[str, Any]]:
    """(`cai eval hhh`, its command) of every command and group."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from cli_commands(child, f"{path} {name}")


CLI: dict[str, Any] = dict(cli_commands(typer.main.get_command(build_app())))


def command_of(line: str) -> str:
    """The command that a line names, such as `cai eval hhh`; the line's first two words where there is no such command."""
    words = line.split()
    known = [" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in CLI]
    return known[0] if known else " ".join(words[:2])


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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


def test_the_cli_page_is_the_output_of_help() -> None:
    assert (ROOT / "docs/cli.md").read_text() == render(), "run `make docs`"


def test_the_shell_quickstart_is_the_yaml_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = Path("examples/quickstart.yaml")
    steps = plan(load_run(file), file, Path("runs/quickstart"))
    script = Path("examples/quickstart.sh").read_text().splitlines()
    assert [line for line in script if line.startswith("cai ")] == [step.shell for step in steps]


@pytest.mark.parametrize("name", ["contrast", "character"])
def test_an_example_without_a_judge_is_planned_and_estimated(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    file = Path(f"examples/{name}.yaml")
    rows = {each.step: each.rows for each in estimate(plan(load_run(file), file, tmp_path))}
    assert rows["preferences"] == {"contrast": 256, "character": 64}[name]


def test_the_make_targets_of_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {s for page in PAGES for s in [*spans(page), *blocks(page, "sh")] if s.startswith("make ")}
    assert {"make demo", "make test"} <= set(blocks(ROOT / "README.md", "sh"))
    for target in named:
        assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE), target


def test_the_readme_installs_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("--quiet ", "").replace("-e '.[dev]'", ".")
    installs = [line for line in blocks(ROOT / "README.md", "sh") if line.startswith("pip ")]
    assert installs
    for line in installs:
        assert f"$(BIN)/{line}\n" in makefile


def test_the_version_is_the_same_everywhere() -> None:
    released = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released
    assert released.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == __version__


def test_every_guarantee_names_tests_that_exist() -> None:
    page = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8").partition("## Limits")[0]
    guarantees = re.findall(r"^- (.*?)(?=\n- |\n#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert guarantees
    for guarantee in guarantees:
        links = re.findall(r"\[[^]]+\]\(([^)]+)\)", guarantee)
        assert links, guarantee
        for link in links:
            file = ROOT / "docs" / link
            assert file.name.startswith("test_")
            assert re.search(r"^(async )?def test_", file.read_text(), re.MULTILINE), link


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob(".github/**/*.md")], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


def test_the_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for span in spans(page):
            if re.fullmatch(r"[\w-]+(/[\w.-]*)+", span) and not span.startswith("runs/"):
                places = [ROOT, ROOT / "cai_cli"]
                if any((place / span.partition("/")[0]).is_dir() for place in places):
                    assert any((place / span).exists() for place in places), f"{page.name}: {span}"


def test_the_commands_and_options_that_the_pages_name_exist() -> None:
    options = {o for command in CLI.values() for p in command.params for o in (*p.opts, *p.secondary_opts)}
    options |= {f"--{name}" for stage in STAGES.values() for name in stage.config.option_names()}  # old names too
    for page in PAGES:
        for span in spans(page):
            if re.match(r"cai [a-z]", span):
                assert command_of(span) in CLI, f"{page.name}: {span}"
            for option in re.findall(r"^--[\w-]+", span):
                assert option in options, f"{page.name}: {span}"


def test_commands_that_need_no_model_run(cai: Cai, tmp_path: Path) -> None:
    for folder in ("examples", "principles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    light = {command for command in commands() if LIGHT.match(command)}
    assert light
    for command in sorted(light):
        done = cai(*shlex.split(command)[1:])
        assert done.code == 0, f"{command}: {done.stderr}"
        assert done.stdout


def test_commands_that_need_a_gpu_or_a_server_have_valid_options() -> None:
    """The `text` blocks show commands that no test can run: they are parsed only."""
    for page in PAGES:
        variables = {"URL": "http://127.0.0.1:8000/v1"}
        for line in blocks(page, "text"):
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", value, line)  # noqa: PLW2901
            if assigned := re.fullmatch(r"(\w+)=\"(.*)\"", line):
                variables[assigned[1]] = assigned[2]
            elif line.startswith("cai "):
                name = command_of(line)
                CLI[name].make_context(name, shlex.split(line, comments=True)[len(name.split()) :])


def write_files_of_other_tools(folder: Path) -> None:
    """The inputs of the examples of `cai convert`."""
    turns = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "A pear."}]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": turns}]))
    asked = {"messages": [{"role": "user", "content": "Name a fruit."}]}
    (folder / "batch_input.jsonl").write_text(json.dumps({"custom_id": "p1", "body": asked}) + "\n")
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A pear."}}
    answer = {"status_code": 200, "body": {"choices": [choice]}}
    row = {"id": "b1", "custom_id": "p1", "error": None, "response": answer}
    (folder / "batch_output.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def forks() -> Iterator[Forks]:
    """Importing the libraries takes longer than most commands: it is done once for all."""
    made = Forks(
        "cai_cli.models.loading", "datasets", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.dpo_trainer",
        "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "transformers.models.llama.modeling_llama", own_cache=False,
    )  # fmt: skip
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_other_commands_run_on_the_real_model(forks: Forks, tmp_path: Path) -> None:
    for folder in ("examples", "principles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    write_files_of_other_tools(tmp_path)
    heavy = [command for command in commands() if not re.match(r"make |pip ", command) and not LIGHT.match(command)]
    assert all(command.startswith("cai ") for command in heavy)
    for command in heavy:
        if "|" in command:
            done = run_shell(command, tmp_path)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        else:
            ended = forks.run(*shlex.split(command)[1:], cwd=tmp_path)
            assert ended.code == 0, f"{command}: {ended.stderr}"
    made = {p.name for p in (tmp_path / "runs/docs").iterdir()}
    expected = {"samples.jsonl", "preferences.jsonl", "sl-cai", "pm", "rl-cai", "piped", "merged.jsonl", "report.html"}
    assert expected | {"dataset"} <= made


def error_codes() -> set[str]:
    """The error codes in the package: literal `code=` arguments, and the defaults of such parameters."""
    found = set()
    for file in (ROOT / "cai_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values: list[ast.expr | None] = []
            if isinstance(node, ast.Call):
                values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            elif isinstance(node, ast.arguments):
                values = [d for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if a.arg == "code"]
            found |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return found


def test_the_page_of_error_codes_lists_every_code() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(error_codes())


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
    assert {p.name for p in Path(found.stdout.strip()).iterdir()} == {p.name for p in (ROOT / "principles").iterdir()}
    templates = ROOT / "cai_cli/report/templates"
    assert {p.name for p in (target / "cai_cli/report/templates").iterdir()} == {p.name for p in templates.iterdir()}
    assert (target / "cai_cli/py.typed").exists()


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
