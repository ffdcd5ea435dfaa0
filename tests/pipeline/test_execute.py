"""`cai run`: a pipeline runs the steps that are not done, and reports why it runs a step again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Cai
from helpers import Json, rows_in, sample_row, write_rows

from cai_cli.cli.app import build_app
from cai_cli.common.errors import CaiError
from cai_cli.constitution.schema import PreferenceConstitution, open_constitution
from cai_cli.pipeline.estimate import StepEstimate, estimate
from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.registry import STAGES
from cai_cli.pipeline.run_file import load_run

PIPELINE = """\
name: pipeline
model: scripted:script.jsonl
seed: 3
steps:
  samples: {command: sample, input: prompts.jsonl, n: 2}
  revisions: {command: critique-revise, input: "@samples", rounds: 1}
  helpful: {command: sample, input: helpful.txt}
  preferences: {command: label-prefs, input: "@samples", both-orders: false}
"""
STEPS = ["samples", "revisions", "helpful", "preferences"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(6)))
    (tmp_path / "helpful.txt").write_text("how?\nwhy?\n")
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]}])
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cai_cli", "run", "pipeline.yaml", "--out", "out", *words],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The steps whose command was started."""
    return [line.split("]")[0][1:] for line in done.stderr.splitlines() if "] $ cai " in line]


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "pipeline.yaml").read_text()
    assert old in text
    (folder / "pipeline.yaml").write_text(text.replace(old, new))


def state(folder: Path) -> Json:
    return json.loads((folder / "out/run.json").read_text())["steps"]  # type: ignore[no-any-return]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "out").glob("*.jsonl")}


def test_a_pipeline_runs_once_and_after_a_change_only_what_it_touches(folder: Path) -> None:
    first = run(folder)
    assert first.returncode == 0, first.stderr
    assert ran(first) == STEPS
    assert {name: s["status"] for name, s in state(folder).items()} == dict.fromkeys(STEPS, "done")
    assert len(rows_in(folder / "out/samples.jsonl")) == 12
    assert rows_in(folder / "out/preferences.jsonl")
    before = contents(folder)

    again = run(folder)
    assert ran(again) == []
    assert again.stderr.count("already done") == 4
    assert contents(folder) == before

    edit(folder, "rounds: 1", "rounds: 2")
    changed = run(folder)
    assert ran(changed) == ["revisions"]
    assert "settings.rounds: 1 -> 2" in changed.stderr
    assert contents(folder).keys() == before.keys()
    assert [name for name in before if contents(folder)[name] != before[name]] == ["revisions.jsonl"]

    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"id": "p6", "prompt": "question 6"}\n')
    grown = run(folder)
    assert ran(grown) == ["samples", "revisions", "preferences"]
    assert "files.input: " in grown.stderr
    assert "after it revisions, preferences" in grown.stderr
    assert "[revisions] changed since its last run (an earlier step changed)" in grown.stderr
    assert len(rows_in(folder / "out/samples.jsonl")) == 14

    (folder / "out/helpful.jsonl").unlink()
    assert ran(run(folder)) == ["helpful"]


def start_and_kill(folder: Path, until: Path, sent: signal.Signals) -> int:
    """Start the pipeline and send a signal once the file `until` is not empty. Returns the exit code, once every child has
    ended."""
    child = subprocess.Popen(
        [sys.executable, "-m", "cai_cli", "run", "pipeline.yaml", "--out", "out"], cwd=folder, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (until.exists() and until.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(sent)
    code = child.wait(timeout=30)
    lock = until.with_name(until.name.replace(".partial", ".lock"))
    while _held(lock) and time.monotonic() < deadline:
        time.sleep(0.01)
    return code


def _held(lock: Path) -> bool:
    from filelock import FileLock, Timeout

    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_an_interrupted_step_resumes_where_it_stopped(sent: signal.Signals, code: int, folder: Path) -> None:
    edit(folder, "n: 2", "n: 2, batch-size: 2")
    (folder / "pipeline.yaml").write_text(
        "\n".join((folder / "pipeline.yaml").read_text().splitlines()[:5])
    )  # one step is enough
    assert run(folder).returncode == 0
    calm = contents(folder)
    write_rows(
        folder / "script.jsonl", [{"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0], "seconds": 0.05}]
    )
    for path in (folder / "out").iterdir():
        path.unlink()
    partial = folder / "out/samples.jsonl.partial"
    assert start_and_kill(folder, partial, sent) == code
    assert state(folder)["samples"]["status"] == "running"
    kept = partial.read_bytes().count(b"\n")
    assert 0 < kept < 12
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert f"{kept} rows are finished" in done.stderr
    assert contents(folder) == calm


def test_a_change_is_applied_even_if_its_step_failed_to_start(folder: Path) -> None:
    assert run(folder).returncode == 0
    edit(folder, "rounds: 1", "rounds: 2")
    script = (folder / "script.jsonl").read_text()
    (folder / "script.jsonl").unlink()  # the step fails before it touches its old output
    assert run(folder).returncode == 1
    (folder / "script.jsonl").write_text(script)
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert {len(row["history"]) for row in rows_in(folder / "out/revisions.jsonl")} == {2}


def test_a_failing_step_stops_the_run_and_is_named(folder: Path) -> None:
    edit(folder, "rounds: 1", "rounds: 1, principles: nonsense")
    done = run(folder)
    assert done.returncode == 1
    assert ran(done) == ["samples", "revisions"]
    assert "no principle 'nonsense'" in done.stderr
    assert "step 'revisions' ended with exit code 1: cai critique-revise out/samples.jsonl" in done.stderr
    edit(folder, ", principles: nonsense", "")
    assert ran(run(folder)) == ["revisions", "helpful", "preferences"]


def test_json_prints_one_object_about_every_step(folder: Path) -> None:
    done = run(folder, "--json", "--quiet")
    # The warning about worthless labels is printed even with --quiet, by the step and again at the end.
    by_step, at_the_end = done.stderr.splitlines()
    why = "the judge saw one order only, and picks the first reply in 100.0%"
    assert by_step.startswith(f"warning: do not trust these labels: {why}")
    assert at_the_end.startswith(f"warning: do not trust the labels of step 'preferences': {why}")
    summary = json.loads(done.stdout)
    assert summary["steps"][3]["labels"]["trusted"] is False
    assert state(folder)["preferences"]["labels"] == summary["steps"][3]["labels"]
    assert "labels" not in state(folder)["samples"]
    assert [(s["step"], s["status"]) for s in summary["steps"]] == [(name, "done") for name in STEPS]
    assert summary["report"] == "out/report.html"
    assert "4 of 4 steps done" in (folder / "out/report.html").read_text()


def test_a_report_that_cannot_be_written_gives_a_warning_and_the_run_is_done(folder: Path) -> None:
    (folder / "out/report.html").mkdir(parents=True)
    done = run(folder, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["report"] is None
    assert "the run finished, but its report could not be written: cannot write out/report.html" in done.stderr
    assert "hint: cai report out" in done.stderr


def test_a_dry_run_counts_and_writes_nothing(cai: Cai, folder: Path) -> None:
    done = cai("run", "pipeline.yaml", "--dry-run", "--json", "--out", "out")
    assert done.code == 0, done.stderr
    found = {e["step"]: e for e in json.loads(done.stdout)}
    assert {name: (e["rows"], e["requests"], e["new_tokens"]) for name, e in found.items()} == {
        "samples": (12, 12, 12 * 256),
        "revisions": (12, 24, 24 * 256),
        "helpful": (2, 2, 2 * 256),
        "preferences": (6, 6, 0),
    }
    assert found["samples"]["prompt_tokens"] == 12 * len("\n\nHuman: question 0") / 4
    assert found["preferences"]["prompt_tokens"] > 6 * 2 * 256
    assert found["preferences"]["command"].endswith("--model scripted:script.jsonl --seed 3")
    assert not (folder / "out").exists()
    table = cai("run", "pipeline.yaml", "--dry-run", "--out", "out").stdout
    assert table.count("  $ cai ") == 4
    total, assumed = table.splitlines()[-2:]
    assert total.split() == ["total", "44", *total.split()[2:]]
    assert assumed.startswith("GPU-h: H100 hours")


# --- the file ---------------------------------------------------------------------------------------------------------


def planned(folder: Path, steps: str, head: str = "name: n\n") -> list[Step]:
    path = folder / "run.yaml"
    path.write_text(f"{head}steps:\n{steps}")
    return plan(load_run(path), path, Path("out"))


def test_settings_become_the_command_line_and_shared_ones_fill_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    head = "name: n\nmodel: m\nseed: 7\n"
    (first, second, third) = planned(
        folder,
        "  a: {command: sample, input: prompts.jsonl, n: 2, seed: 1, kind: null}\n"
        '  b: {command: critique-revise, input: "@a", critique: false, few-shot: none, constitution: pipeline.yaml}\n'
        '  c: {command: sft, input: "@b", helpful: helpful.txt, lora: false}\n',
        head,
    )
    name = folder.name
    assert first.shell == f"cai sample {name}/prompts.jsonl -o out/a.jsonl --n 2 --seed 1 --model m"
    assert second.shell == (
        f"cai critique-revise out/a.jsonl -o out/b.jsonl --no-critique --few-shot none --constitution {name}/pipeline.yaml"
        " --model m --seed 7"
    )
    assert third.shell == f"cai sft out/b.jsonl -o out/c --helpful {name}/helpful.txt --full --model m --seed 7"
    assert (second.needs, third.needs) == ([first], [second])
    assert set(second.files) == {"constitution"}


def test_a_dataset_on_the_hub_is_not_a_relative_path(folder: Path) -> None:
    (step,) = planned(folder, "  a: {command: sample, input: 'hf://datasets/owner/name'}\n")
    assert step.settings["input"] == "hf://datasets/owner/name"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("  a: {command: smaple, input: x}\n", "step 'a': unknown command 'smaple'"),
        ("  a: {input: x}\n", "step 'a': unknown command None"),
        ("  a: {command: sample}\n", "step 'a': `input` is missing"),
        ("  a: {command: sample, input: prompts.jsonl, tempreture: 1}\n", "`cai sample` has no option 'tempreture'"),
        ("  a: {command: sample, input: prompts.jsonl, output: x}\n", "has no option 'output'"),
        ("  a: {command: sample, input: prompts.jsonl, overwrite: true}\n", "has no option 'overwrite'"),
        ("  a: {command: sample, input: '@b'}\n  b: {command: sample, input: prompts.jsonl}\n", "no earlier step 'b'"),
        ("  a: {command: sample, input: '@a'}\n", "no earlier step 'a'"),
        ("  a: {command: sample, input: none.jsonl}\n", "cannot read"),
        ("  a: {command: sample, input: prompts.jsonl, n: banana}\n", "step 'a': n: must be a valid integer"),
        ("  a: {command: sample, input: prompts.jsonl, n: 0}\n", "step 'a': n: must be greater than or equal"),
        (
            "  a: {command: sample, input: prompts.jsonl, skip-invalid: 7}\n",
            "skip-invalid: must be true or false, not 7",
        ),
        ("  ../a: {command: sample, input: prompts.jsonl}\n", "../a"),
        (
            "  a: {command: sample, input: prompts.jsonl}\n  a: {command: sample, input: prompts.jsonl}\n",
            "'a' occurs twice",
        ),
        ("  a: &x {command: sample, input: prompts.jsonl}\n  b: *x\n", "aliases are not allowed"),
        ("  a: {command: sample, input: [[x]]}\n", "steps.a.input"),
        ("  {}\n", "steps"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything_runs(steps: str, reason: str, folder: Path) -> None:
    with pytest.raises(CaiError) as error:
        planned(folder, steps)
    assert reason in error.value.message
    assert "run.yaml" in error.value.message or reason == "cannot read"
    assert "\n" not in error.value.message


@pytest.mark.parametrize("head", ["name: n\nmore: 1\n", "name: ../n\n", "", "name: n\nseed: x\n"])
def test_an_invalid_head_is_refused(head: str, folder: Path) -> None:
    with pytest.raises(CaiError) as error:
        planned(folder, "  a: {command: sample, input: prompts.jsonl}\n", head)
    assert error.value.code == "invalid-run-file"
    assert error.value.message.startswith(str(folder / "run.yaml"))


def test_a_key_changes_with_settings_files_and_earlier_steps(folder: Path) -> None:
    def keys(steps: str) -> list[str]:
        return [step.key for step in planned(folder, steps)]

    two = "  a: {command: sample, input: prompts.jsonl}\n  b: {command: critique, input: '@a'}\n"
    before = keys(two)
    assert keys(two) == before
    other: list[Any] = keys(two.replace("prompts.jsonl", "prompts.jsonl, n: 2"))
    assert all(a != b for a, b in zip(before, other, strict=True))
    os.truncate(folder / "prompts.jsonl", 0)
    assert all(a != b for a, b in zip(before, keys(two), strict=True))


@pytest.mark.parametrize(
    ("settings", "requests", "new_tokens"),
    [
        ("both-orders: false", 18, 0),
        ("principles-per-pair: 2", 18 * 2 * 2, 0),
        ("principles-per-pair: all, max-principles: 3", 18 * 3 * 2, 0),
        ("pairs: random, both-orders: false", 9, 0),
        ("method: contrast", 18 * 2, 0),
        ("method: cot, cot-samples: 3, max-new-tokens: 10", 18 * 2 * 3 * 2, 18 * 2 * 3 * 10),
        ("method: verdict, max-new-tokens: 10", 18 * 2, 18 * 2 * 10),
    ],
)
def test_the_plan_counts_the_requests_of_each_judging_method(
    settings: str, requests: int, new_tokens: int, folder: Path
) -> None:
    (folder / "six.txt").write_text("".join(f"question {i}\n" for i in range(6)))
    steps = f"  a: {{command: sample, input: six.txt, n: 3}}\n  b: {{command: label-prefs, input: '@a', {settings}}}\n"
    found = estimate(planned(folder, steps))[1]
    assert (found.requests, found.tokens.new_tokens) == (requests, new_tokens)


def test_the_plan_reads_a_named_input_as_the_command_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rows = [sample_row(i) for i in range(4)]
    for name in ("old.jsonl", "a=b.jsonl"):
        write_rows(folder / name, rows)
    steps = "  a: {command: sample, input: prompts.jsonl}\n"
    steps += "  b: {command: eval compare, input: ['x=@a', y=old.jsonl, a=b.jsonl], judge: 'scripted:script.jsonl'}\n"
    found = estimate(planned(folder, steps))[1]
    assert (found.rows, found.requests) == (4 * 3, 4 * 3 * 2)


def test_the_plan_of_rl_counts_the_requests_to_its_monitor(folder: Path) -> None:
    def planned_rl(monitor_model: str) -> StepEstimate:
        settings = f"pm: pm, steps: 20, max-new-tokens: 10{monitor_model}"
        return estimate(planned(folder, f"  a: {{command: rl, input: prompts.jsonl, {settings}}}\n"))[0]

    alone, judge, pm = (planned_rl(w) for w in ("", ", monitor-judge: judge", ", monitor-pm: other"))
    prompt, replies = len("\n\nHuman: question 0") / 4, 16  # of one check; there are three
    requests = judge.requests - alone.requests
    assert (requests, pm.requests) == (2 * 2 * replies, alone.requests)
    examples = open_constitution(PreferenceConstitution, None, None).examples
    few_shot = sum(len(example.model_dump_json()) for example in examples) / 4
    read = judge.tokens.prompt_tokens - alone.tokens.prompt_tokens
    assert read == pytest.approx(requests * (few_shot + prompt + 2 * 10))
    assert pm.tokens.prompt_tokens - alone.tokens.prompt_tokens == pytest.approx(3 * replies * (prompt + 10))
    assert judge.tokens.new_tokens == pm.tokens.new_tokens == alone.tokens.new_tokens


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_an_option_has_one_name_in_the_shell_and_in_a_run_file(stage: str) -> None:
    names, options = STAGES[stage].config.option_names(), STAGES[stage].config.options()
    command: Any = typer.main.get_command(build_app())
    for word in stage.split():
        command = command.commands[word]
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for name, field in names.items():
        _, declared = options[field]
        assert declared.argument or name in declared.aliases or f"--{name}" in flags, name
