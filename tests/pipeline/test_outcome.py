"""`outcome` of a run file: the steps it names, and what `run.json` records at its end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import sample_row, write_rows
from pipeline_cases import planned

from cai_cli.common.errors import CaiError
from cai_cli.evaluate.outcome import headline
from cai_cli.pipeline.outcome import check_outcome, measure
from cai_cli.pipeline.run_file import load_run

STEPS = """\
  sl: {command: sft, input: prompts.jsonl}
  before: {command: sample, input: prompts.jsonl}
  after: {command: sample, input: prompts.jsonl, model: "@sl"}
  swept: {command: sample, input: prompts.jsonl, n: [1, 2]}
  labels: {command: eval refusals, input: "@after"}
  compare: {command: eval compare, input: [start=@before, final=@after], judge: base}
"""
HEAD = "name: n\nmodel: base\noutcome: %s\n"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ('{win_rate: "@compare", refusals: {before: "@before", after: "@after"}}', None),
        ('{win_rate: "@compare"}', None),
        ('{win_rate: "@nothing"}', "unknown-step"),
        ("{win_rate: compare}", "unknown-step"),
        ('{win_rate: "@before"}', "invalid-run-file"),
        ('{refusals: {before: "@before", after: "@compare"}}', "invalid-run-file"),
        ('{refusals: {before: "@before", after: "@swept"}}', "unknown-step"),
        ('{refusals: {before: "@before"}}', "invalid-run-file"),
        ("{}", "invalid-run-file"),
        ('{wins: "@compare"}', "invalid-run-file"),
        ('{win_rate: ""}', "invalid-run-file"),
        ('{win_rate: "@compare", refusals: {before: "@after", after: "@before"}}', "invalid-run-file"),
        ('{refusals: {before: "@before", after: "@labels"}}', "invalid-run-file"),
    ],
)
def test_an_outcome_names_steps_that_the_plan_has_and_that_fit(folder: Path, outcome: str, code: str | None) -> None:
    def check() -> None:
        steps = planned(folder, STEPS, HEAD % outcome)
        check_outcome(load_run(folder / "run.yaml").outcome, steps)

    if code is None:
        check()
        return
    with pytest.raises(CaiError) as error:
        check()
    assert error.value.code == code


def test_prompts_that_a_step_trained_on_are_left_out_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    outcome = '{refusals: {before: "@before", after: "@after"}}'
    steps = planned(folder, STEPS, HEAD % outcome)
    Path("out").mkdir()
    rows = [sample_row(i, reply="I can't help with that.") | {"kind": "red-team"} for i in range(5)]
    for name in ("before", "after"):
        write_rows(Path(f"out/{name}.jsonl"), rows)
    trained = write_rows(Path("trained.jsonl"), rows[:2])
    Path("out/sl.manifest.json").write_text(json.dumps({"run": {"inputs": {"revisions": str(trained)}}}))
    given = load_run(folder / "run.yaml").outcome
    assert given is not None
    found = measure(given, steps, Path("out"))
    assert found["seen_in_training"] == 2
    assert [found["refusals_red_team"][part]["n"] for part in ("before", "after", "change")] == [3, 3, 3]
    assert (found["start"], found["final"]) == ("before", "after")
    assert found["seen_prompts"] == [rows[0]["id"], rows[1]["id"]]
    assert "unchecked" not in found


def test_trained_prompts_are_found_in_any_columns_and_under_a_system_prompt_and_files_that_are_gone_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    steps = STEPS.replace("input: prompts.jsonl}", 'input: asked.csv, column: "prompt=ask,completion=say"}', 1)
    Path("asked.csv").write_text(f"ask,say\n{sample_row(0)['prompt'][-1]['content']},No.\n")
    planned_steps = planned(folder, steps, HEAD % '{refusals: {before: "@before", after: "@after"}}')
    Path("out").mkdir()
    rows = [sample_row(i, reply="I can't help with that.") | {"kind": "red-team"} for i in range(5)]
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be kind."}, *row["prompt"]]
    for name in ("before", "after"):
        write_rows(Path(f"out/{name}.jsonl"), rows)
    files = {"revisions": planned_steps[0].config.input, "helpful": "gone.jsonl"}
    Path("out/sl.manifest.json").write_text(json.dumps({"run": {"inputs": files}}))
    given = load_run(folder / "run.yaml").outcome
    assert given is not None
    found = measure(given, planned_steps, Path("out"))
    assert (found["seen_in_training"], found["unchecked"]) == (1, ["gone.jsonl"])
    assert "On prompts that were not found in what the run trained on" in headline({**found, "win_rate": None})


def test_a_run_ends_with_its_outcome_and_prints_it(folder: Path) -> None:
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(
        pipeline.read_text()
        + "  again: {command: sample, input: prompts.jsonl, n: 2, seed: 9}\n"
        + "  compare: {command: eval compare, input: [start=@samples, final=@again], judge: scripted:script.jsonl}\n"
        + 'outcome: {win_rate: "@compare", refusals: {before: "@samples", after: "@again"}}\n'
    )
    words = [sys.executable, "-m", "cai_cli", "run", "pipeline.yaml", "--out", "out", "--json"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "out/run.json").read_text())
    assert list(record)[-1] == "outcome"
    outcome = record["outcome"]
    assert json.loads(done.stdout)["outcome"] == outcome
    assert outcome["replies"] == {"start": "samples.jsonl", "final": "again.jsonl"}
    assert outcome["judge"] == "scripted:script.jsonl"
    assert outcome["win_rate"].keys() == {"value", "low", "high", "n"}
    assert outcome["win_rate"]["n"] == 12
    assert "outcome: final wins " in done.stderr
