"""Rounds end where the monitor's score no longer rises or a budget is used up, with stages that only write files."""

import json
from pathlib import Path

import pytest
from conftest import Cai, Done
from helpers import Json, assistant, rows_in, user, write_rows
from pipeline_cases import planned
from rounds_world import plant, share_of_good

from cai_cli.common.errors import UsageError
from cai_cli.pipeline.plan import Step
from cai_cli.pipeline.step_process import StepProcesses
from cai_cli.pipeline.stop_rounds import check_stops
from cai_cli.runtime.manifest import write_json

PROMPTS = 12
SCORES = {
    1: (0.0, 1.0),
    2: (1.0, 2.0),
    3: (2.0, 2.0),
    4: (2.0, 3.0),
}  # round -> the monitor's score before and after it
RUN = """\
name: n
model: base
steps:
  rounds:
    repeat: {repeat}
    stop: {stop}
    steps:
      pairs: {{command: sample, input: prompts.jsonl, model: "@policy@last", n: 2}}
      labels: {{command: label-prefs, input: "@pairs"}}
      policy: {{command: dpo, input: "@labels", model: "{start}", monitor-pm: other}}
  after: {{command: sample, input: prompts.jsonl, model: "@policy"}}
  compare: {{command: eval compare, input: ["@after", "@pairs@*"], judge: base}}
"""


def replies(step: int, score: float | None) -> list[Json]:
    """The monitor's rows of one check, whose scores have this mean."""
    return [
        {"id": f"p{n}", "prompt": user("why?"), "sample_index": 0, "completion": assistant("so"), "step": step,
         "reply_tokens": 1, "score": 0.0, "finish_reason": "stop", "monitor_score": None if score is None else score + (n % 3 - 1) * (0.1 + step)}
        for n in range(PROMPTS)
    ]  # fmt: skip


class Stages:
    """Stands for all stages: a step writes its output with the planted scores, and is counted."""

    def __init__(self, scores: dict[int, tuple[float | None, float | None]]) -> None:
        self.scores, self.ran = scores, list[str]()

    def __call__(self, step: Step, overwrite: bool) -> None:
        self.ran.append(step.name)
        usage = (
            {"run": {"usage": {"prompt_tokens": 900, "new_tokens": 100, "cost": 2.0}}}
            if step.command == "sample"
            else {}
        )
        write_json(step.output.with_name(f"{step.output.name}.manifest.json"), usage)
        if step.stage.trains:
            step.output.mkdir()
            before, after = self.scores[int(step.name.partition("@")[2])]
            write_rows(step.output / "samples.jsonl", [*replies(0, before), *replies(1, after)])
        else:
            step.output.write_text("")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    made = Stages(dict(SCORES))
    monkeypatch.setattr(StepProcesses, "run", lambda self, step, overwrite: made(step, overwrite))
    monkeypatch.setattr("cai_cli.cli.run.report_finished_run", lambda folder: None)
    monkeypatch.setattr("cai_cli.pipeline.execute._label_trust", lambda step: {})
    return made


def run(cai: Cai, stop: str, *, repeat: int = 4, start: str = "@policy@last") -> Done:
    folder = Path.cwd()
    write_rows(folder / "prompts.jsonl", [{"id": f"p{n}", "prompt": "why?"} for n in range(PROMPTS)])
    (folder / "run.yaml").write_text(RUN.format(repeat=repeat, stop=stop, start=start))
    return cai("run", "run.yaml", "--out", "out", "--json")


def recorded() -> Json:
    return json.loads(Path("out/run.json").read_text())["rounds"]["rounds"]  # type: ignore[no-any-return]


def argv(step: str) -> str:
    return " ".join(json.loads(Path("out/run.json").read_text())["steps"][step]["argv"])


def test_rounds_end_when_the_monitor_no_longer_rises_and_the_result_is_the_round_before(
    cai: Cai, stages: Stages
) -> None:
    done = run(cai, "{monitor: policy}")
    assert done.code == 0, done.stderr
    of_rounds = [f"{step}@{number}" for number in (1, 2, 3) for step in ("pairs", "labels", "policy")]
    assert stages.ran == [*of_rounds, "after", "compare"]
    report = recorded()
    assert (report["repeat"], report["ran"], report["result"]) == (4, 3, 2)
    assert "does not rise in round 3" in report["reason"]
    assert report["reason"] in done.stderr
    assert [round["rise"]["value"] for round in report["rounds"]] == pytest.approx([1.0, 1.0, 0.0])
    assert [round["monitor"]["value"] for round in report["rounds"]] == pytest.approx([1.0, 2.0, 2.0])
    assert json.loads(done.stdout)["rounds"]["rounds"] == report
    assert "--model out/policy@2 " in argv("after")
    assert "out/after.jsonl out/pairs@1.jsonl out/pairs@2.jsonl out/pairs@3.jsonl -o" in argv("compare")

    again = run(cai, "{monitor: policy}")
    assert again.stderr.count("already done") == 11
    assert recorded() == report


def test_a_round_that_starts_from_the_base_is_compared_with_the_replies_of_the_round_before(
    cai: Cai, stages: Stages
) -> None:
    stages.scores = {1: (0.0, 1.0), 2: (0.0, 2.0), 3: (0.0, 1.5)}
    assert run(cai, "{monitor: policy}", start="base").code == 0
    assert [round["rise"]["value"] for round in recorded()["rounds"]] == pytest.approx([1.0, 1.0, -0.5])
    assert recorded()["result"] == 2


def test_the_result_is_the_first_round_where_none_rises_and_the_last_where_all_do(cai: Cai, stages: Stages) -> None:
    stages.scores = {1: (1.0, 1.0)}
    assert run(cai, "{monitor: policy}").code == 0
    assert (recorded()["ran"], recorded()["result"]) == (1, 1)
    stages.scores = {1: (1.0, None)}
    for file in Path("out").glob("policy@1/*"):
        file.unlink()
    Path("out/policy@1").rmdir()
    assert run(cai, "{monitor: policy}").code == 0
    assert recorded()["reason"] == "the monitor gave no scores in round 1"


def test_rounds_end_before_one_that_would_exceed_a_budget(cai: Cai, stages: Stages) -> None:
    assert run(cai, "{tokens: 1.0e+9}", repeat=2).code == 0
    assert (recorded()["ran"], recorded()["reason"]) == (2, None)
    used = recorded()["rounds"][0]["tokens"]
    assert used > 1000  # 1,000 are counted while sampling; training and labels are estimated
    stages.ran.clear()
    assert run(cai, f"{{tokens: {used + 1}}}", repeat=2).code == 0
    assert (recorded()["ran"], recorded()["result"]) == (1, 1)
    assert "another round would exceed them" in recorded()["reason"]
    assert stages.ran == ["after", "compare"]  # which now read the first round


def test_a_dry_run_shows_all_rounds_and_where_they_may_end(cai: Cai, stages: Stages) -> None:
    run(cai, "{monitor: policy, hours: 3}")
    done = cai("run", "run.yaml", "--dry-run", "--json", "--out", "other")
    found = {e["step"]: e["may_end"] for e in json.loads(done.stdout)}
    assert len(found) == 14
    assert [step for step, why in found.items() if why] == ["policy@1", "policy@2", "policy@3"]
    assert found["policy@2"] == (
        "if the monitor's score of policy does not rise in round 2 or if another round would exceed 3 hours"
    )


@pytest.mark.parametrize(
    ("stop", "policy", "reason"),
    [
        ("{monitor: pairs}", "monitor-pm: other", "not a step of the block that has a monitor"),
        ("{monitor: policy}", "beta: 0.1", "not a step of the block that has a monitor"),
        ("{monitor: policy}", "monitor-pm: other, beta: [0.1, 0.2]", "a list makes several policies"),
        ("{monitor: policy}", 'monitor-pm: "@pm"', "the monitor is trained in the block"),
        ("{money: 3}", "monitor-pm: other", "no step has a price"),
    ],
)
def test_a_block_that_cannot_be_stopped_as_it_says_is_refused(
    stop: str, policy: str, reason: str, folder: Path
) -> None:
    steps = f"""\
  rounds:
    repeat: 2
    stop: {stop}
    steps:
      pairs: {{command: sample, input: prompts.jsonl, n: 2}}
      labels: {{command: label-prefs, input: "@pairs"}}
      pm: {{command: train-pm, input: "@labels"}}
      policy: {{command: dpo, input: "@labels", {policy}}}
"""
    made = planned(folder, steps)
    from cai_cli.pipeline.run_file import load_run

    with pytest.raises(UsageError) as error:
        check_stops(load_run(folder / "run.yaml"), made)
    assert reason in error.value.message


# --- real stages --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_planted_world_two_rounds_move_the_policy_further_than_one_and_the_third_ends_them(
    cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_process(self: StepProcesses, step: Step, overwrite: bool) -> None:
        step.stage.run(step.config.model_copy(update={"overwrite": overwrite, "quiet": True}))

    plant(cai, tmp_path, repeat=4, steps=6)
    monkeypatch.setattr(StepProcesses, "run", in_process)
    done = cai("run", "run.yaml", "--out", "out", "--quiet")
    assert done.code == 0, done.stderr
    shares = [share_of_good(tmp_path / f"out/pairs@{number}.jsonl") for number in (1, 2, 3)]
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.05
    assert (recorded()["ran"], recorded()["result"]) == (3, 2)
    assert share_of_good(tmp_path / "out/after.jsonl") == pytest.approx(shares[2], abs=0.1)
    labels = [len(rows_in(tmp_path / f"out/labels@{number}.jsonl")) for number in (1, 2)]
    counts = json.loads((tmp_path / "out/dpo@2.manifest.json").read_text())["counts"]
    assert counts["in"] == sum(labels)  # the labels of the first round too
    page = (tmp_path / "out/report.html").read_text()
    assert "The result is that of round 2" in page
    assert "chart-dpo-monitor_score-by-round" in page
    assert "chart-labels-length_correlation-by-round" in page
