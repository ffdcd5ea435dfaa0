"""`cai run --dry-run --size 8B`: what every step needs on 1 and on 8 GPUs, without a model of that size."""

import json
from pathlib import Path

import pytest
from conftest import Cai
from helpers import preference, revision, sample_row, write_rows

from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.run_file import load_run
from cai_cli.pipeline.size_plan import GPUS, plan_size
from cai_cli.training.memory import GIB

ROOT = Path(__file__).parents[2]
RUN = """name: n
model: not/here
steps:
  sl: {command: sft, input: revisions.jsonl, lora: true}
  head: {command: train-pm, input: pairs.jsonl, model: "@sl", fit-head: true, epochs: 0}
  policy: {command: dpo, input: pairs.jsonl, model: "@sl", lora: true, monitor-prompts: 0}
  rounds:
    repeat: 2
    start: "@sl"
    steps:
      rl: {command: rl, input: rows.jsonl, model: "@rl@last", judge: not/here, max-principles: 1, steps: 2, lora: true}
  after: {command: sample, input: rows.jsonl, model: "@rl", max-new-tokens: 8}
  labels: {command: label-prefs, input: pairs.jsonl}
  scores: {command: score, input: "@after", pm: "@head"}
  compare: {command: eval compare, input: ["before=rows.jsonl", "after=@after"], pm: "@head"}
  served: {command: sample, input: rows.jsonl, model: "openai:x", base-url: "http://localhost:1/v1"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("size")
    write_rows(folder / "rows.jsonl", [sample_row(i) for i in range(16)])
    write_rows(folder / "revisions.jsonl", [revision(i) for i in range(16)])
    write_rows(folder / "pairs.jsonl", [preference(i) for i in range(16)])
    (folder / "run.yaml").write_text(RUN)
    return folder


def test_every_step_has_its_tokens_memory_and_hours_on_each_number_of_gpus(
    folder: Path, cai: Cai, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = cai("run", "run.yaml", "--dry-run", "--size", "8B", "--json")
    assert done.code == 0, done.stderr
    steps = {one["step"]: one for one in json.loads(done.stdout)}
    assert set(steps) == {
        "sl", "head", "policy", "rl@1", "rl@2", "after", "labels", "scores", "compare", "served"
    }  # fmt: skip
    bfloat16 = 2 * 8.03e9
    for name, step in steps.items():
        assert step["prompt_tokens"] + step["new_tokens"] + step["trained_tokens"] > 0, name
        for count in GPUS:
            needs = step["gpus"][str(count)]
            assert needs["hours"] > 0, name
            held = needs["memory"]["peak"]
            # The head is fitted on weights in float32; a preference model has no head of a language model.
            assert held == 0 if name == "served" else 2 * 7.5e9 <= held < 2.3 * bfloat16, name
        one, eight = (step["gpus"][str(count)]["hours"] for count in GPUS)
        if name == "head":
            assert eight == one  # rank 0 fits it
        elif name.startswith("rl"):
            assert one / 8 < eight < one  # rank 0 makes the checks and asks the judge
        elif name != "policy":  # whose held-out pairs rank 0 scores
            assert eight == pytest.approx(one / 8)
    trained = steps["sl"]["trained_tokens"]
    assert steps["sl"]["gpus"]["1"]["hours"] == pytest.approx(6 * trained * 8.03e9 / (0.4 * 989e12) / 3600, rel=1e-2)
    table = cai("run", "run.yaml", "--dry-run", "--size", "8B").stdout.splitlines()
    assert [line.split()[0] for line in table[1 : len(steps) + 1]] == list(steps)
    assert all(len(line.split()) == 8 for line in table[1 : len(steps) + 2])


def test_full_tuning_is_sharded_on_eight_gpus_and_has_no_room_on_one(folder: Path) -> None:
    path = folder / "full.yaml"
    path.write_text("name: n\nsteps:\n  sl: {command: sft, input: revisions.jsonl}\n")
    (step,) = plan_size(plan(load_run(path), path, folder), "8B")
    assert (step.needs[1].fits, step.needs[8].fits) == (False, True)
    assert step.needs[1].parts["optimizer"] / GIB == pytest.approx(59.8, abs=0.1)  # as in docs/scale.md
    assert step.needs[8].parts["optimizer"] / GIB == pytest.approx(7.5, abs=0.1)


def test_a_size_needs_a_dry_run(folder: Path, cai: Cai) -> None:
    assert cai("run", str(folder / "run.yaml"), "--size", "8B").error == "option-conflict"


def test_the_example_past_the_paper_compares_every_variant_on_prompts_that_can_be_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    file, other = Path("examples/beyond.yaml"), write_rows(tmp_path / "other.jsonl", [sample_row(0)])
    changes = [f"start.input={other}", f"replies.input={other}"]
    steps: dict[str, Step] = {step.name: step for step in plan(load_run(file, changes), file, tmp_path)}
    compared = steps["compare"].settings["input"]
    assert isinstance(compared, list)
    names = [
        "start",
        *(f"replies@model={one}" for one in ["sl-cai", "rl-cai", "dpo", "rl-judge", "policy@1", "policy@2"]),
    ]
    assert [Path(str(one)).stem for one in compared] == names
    assert all(Path(str(steps[name].settings["input"])).samefile(other) for name in names)
    assert steps["compare"].settings["pm"] == "smollm2-135m+examples/feedback/harmless_probe"
    assert (steps["policy@2"].settings["model"], steps["policy@2"].settings["pm"]) == (
        str(tmp_path / "policy@1"),
        str(tmp_path / "round-pm@2"),
    )
