"""`cai run`: a pipeline runs the steps that are not done, and reports why it runs a step again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, rows_in, write_rows
from pipeline_cases import start_and_kill

STEPS = ["samples", "revisions", "helpful", "preferences"]


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
    assert start_and_kill(folder, "pipeline.yaml", partial, sent) == code
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
    assert list(json.loads((folder / "out/run.json").read_text())["planned"]) == STEPS
    assert "no principle 'nonsense'" in done.stderr
    assert "step 'revisions' ended with exit code 1: cai critique-revise out/samples.jsonl" in done.stderr
    edit(folder, ", principles: nonsense", "")
    assert ran(run(folder)) == ["revisions", "helpful", "preferences"]


def test_json_prints_one_object_about_every_step(folder: Path) -> None:
    with (folder / "prompts.jsonl").open("a") as file:  # six pairs are too few to say that the first reply always wins
        file.writelines(f'{{"id": "p{i}", "prompt": "question {i}"}}\n' for i in range(6, 12))
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


@pytest.mark.parametrize("steps", [1, {"samples": 1}, {"samples": {}}, {"samples": {"settings": None}}])
def test_a_record_that_cai_run_does_not_write_is_one_line_of_error(folder: Path, steps: object) -> None:
    (folder / "out").mkdir()
    (folder / "out/run.json").write_text(json.dumps({"steps": steps}))
    done = run(folder)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert "run.json" in done.stderr
