"""Rounds become ordinary steps: their names, their references, and what they train on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, preference, write_rows
from pipeline_cases import planned
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.rounds import Ending
from cai_cli.pipeline.run_file import load_run

HEAD = "name: n\nmodel: base\nseed: 3\n"
BLOCK = """\
  sl: {command: sft, input: prompts.jsonl}
  rounds:
    repeat: 2
    start: "@sl"
    carry: %s
    steps:
      pairs: {command: sample, input: prompts.jsonl, model: "@rl@last", n: 2}
      labels: {command: label-prefs, input: "@pairs"}
      pm: {command: train-pm, input: "@labels", model: "@sl"}
      rl: {command: rl, input: prompts.jsonl, model: "@rl@last", pm: "@pm"}
      after: {command: sample, input: prompts.jsonl, model: "@rl", seed: 5}
  last: {command: sample, input: prompts.jsonl, model: "@rl"}
  compare: {command: eval compare, input: ["@after@*", "@last"], judge: base}
"""


REVISED = """\
  rounds:
    repeat: 2
    carry: all
    steps:
      revised: {command: critique-revise, input: prompts.jsonl, model: "@sl@last"}
      sl: {command: sft, input: "@revised", also: [prompts.jsonl], model: "@sl@last"}
"""


def by_name(steps: Sequence[Step]) -> dict[str, Step]:
    return {step.name: step for step in steps}


def test_every_round_starts_from_the_model_of_the_round_before(folder: Path) -> None:
    steps = by_name(planned(folder, BLOCK % "last", HEAD))
    names = ("pairs", "labels", "pm", "rl", "after")
    assert list(steps) == ["sl", *(f"{name}@{number}" for number in (1, 2) for name in names), "last", "compare"]
    models = {name: step.settings.get("model") for name, step in steps.items()}
    assert (models["pairs@1"], models["rl@1"]) == ("out/sl", "out/sl")
    assert (models["pairs@2"], models["rl@2"]) == ("out/rl@1", "out/rl@1")
    assert (models["pm@2"], models["after@2"], models["last"]) == ("out/sl", "out/rl@2", "out/rl@2")
    assert steps["rl@2"].settings["pm"] == "out/pm@2"
    assert [need.name for need in steps["rl@2"].needs] == ["rl@1", "pm@2"]
    assert steps["compare"].settings["input"] == ["out/after@1.jsonl", "out/after@2.jsonl", "out/last.jsonl"]


def test_revisions_of_earlier_rounds_are_not_carried(folder: Path) -> None:
    (also,) = by_name(planned(folder, REVISED, HEAD))["sl@2"].settings["also"]  # type: ignore[misc]
    assert Path(str(also)).name == "prompts.jsonl"


def test_data_of_a_round_get_seeds_of_their_own_and_trainers_keep_theirs(folder: Path) -> None:
    seeds = {name: step.settings["seed"] for name, step in by_name(planned(folder, BLOCK % "last", HEAD)).items()}
    assert (seeds["pairs@1"], seeds["pairs@2"], seeds["labels@2"]) == (3, 4, 4)
    assert (seeds["pm@2"], seeds["rl@2"], seeds["after@2"], seeds["compare"]) == (3, 3, 5, 3)


def test_preference_data_of_earlier_rounds_are_carried_or_replaced(folder: Path) -> None:
    replaced = by_name(planned(folder, BLOCK % "last", HEAD))["pm@2"]
    carried = by_name(planned(folder, BLOCK % "all", HEAD))
    assert "also" not in replaced.settings
    assert "also" not in carried["pm@1"].settings
    assert carried["pm@2"].settings["also"] == ["out/labels@1.jsonl"]
    assert "--also out/labels@1.jsonl" in carried["pm@2"].shell
    assert "labels@1" in [need.name for need in carried["pm@2"].needs]


def test_more_rounds_keep_the_steps_of_the_earlier_ones(folder: Path) -> None:
    two = by_name(planned(folder, BLOCK % "all", HEAD))
    three = by_name(planned(folder, (BLOCK % "all").replace("repeat: 2", "repeat: 3"), HEAD))
    assert all(two[name].key == three[name].key for name in two if "@" in name)
    assert three["pm@3"].settings["also"] == ["out/labels@1.jsonl", "out/labels@2.jsonl"]


def test_where_rounds_have_ended_early_later_steps_read_their_result(folder: Path) -> None:
    planned(folder, (BLOCK % "last").replace("repeat: 2", "repeat: 9"), HEAD)
    path = folder / "run.yaml"
    steps = by_name(plan(load_run(path), path, Path("out"), {"rounds": Ending(ran=3, result=2)}))
    assert "rl@3" in steps
    assert "rl@4" not in steps
    assert steps["last"].settings["model"] == "out/rl@2"
    assert steps["compare"].settings["input"][2:] == ["out/after@3.jsonl", "out/last.jsonl"]  # type: ignore[index]


def test_a_list_in_a_block_takes_one_value_in_all_rounds(folder: Path) -> None:
    steps = """\
  rounds:
    repeat: 2
    carry: all
    steps:
      pairs: {command: sample, input: prompts.jsonl, model: "@dpo@last", n: 2}
      labels: {command: label-prefs, input: "@pairs"}
      dpo: {command: dpo, input: "@labels", model: "@dpo@last", beta: [0.1, 0.3]}
  after: {command: sample, input: prompts.jsonl, model: "@dpo"}
"""
    made = by_name(planned(folder, steps, HEAD))
    assert [name for name in made if name.startswith(("dpo", "after"))] == [
        "dpo@1@beta=0.1", "dpo@1@beta=0.3", "dpo@2@beta=0.1", "dpo@2@beta=0.3", "after@beta=0.1", "after@beta=0.3",
    ]  # fmt: skip
    second = made["dpo@2@beta=0.3"].settings
    assert (second["model"], second["input"]) == ("out/dpo@1@beta=0.3", "out/labels@2@beta=0.3.jsonl")
    assert second["also"] == ["out/labels@1.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("repeat: 2", "repeat: 0", "steps.rounds.repeat"),
        ("carry: last", "carry: some", "steps.rounds.carry"),
        ("carry: last", "stop: {monitr: rl}", "steps.rounds.stop.monitr"),
        ("  last:", "  sl:", "'sl' occurs twice"),
        ("  last:", "  rl:", "two steps have the name 'rl'"),
        ('input: "@labels"', 'input: "@rl"', "no earlier step 'rl@1'"),
        ('"@after@*", "@last"', '"@after@last", "@last"', "no earlier step 'after@last'"),
    ],
)
def test_a_block_that_cannot_be_run_is_refused(old: str, new: str, reason: str, folder: Path) -> None:
    text = BLOCK % "last"
    assert old in text
    with pytest.raises(CaiError) as error:
        planned(folder, text.replace(old, new), HEAD)
    assert reason in error.value.message


def test_a_later_step_must_not_need_a_round_that_may_not_be_run(folder: Path) -> None:
    text = (BLOCK % "last").replace("carry: last", "stop: {hours: 1}")
    planned(folder, text.replace('model: "@rl"}', 'model: "@rl@1"}'), HEAD)
    with pytest.raises(UsageError, match="the rounds may end before round 2"):
        planned(folder, text.replace('model: "@rl"}', 'model: "@rl@2"}'), HEAD)


# --- several constitutions ----------------------------------------------------------------------------------------

CONSTITUTIONS = """\
  pairs: {command: sample, input: prompts.jsonl, n: 2}
  labels: {command: label-prefs, input: "@pairs"}
  revisions: {command: critique-revise, input: "@pairs"}
  dpo: {command: dpo, input: "@labels"}
  after: {command: sample, input: prompts.jsonl, model: "@dpo"}
  judged: {command: eval compare, input: ["@pairs", "@after@*"], judge: base}
  scored: {command: eval compare, input: ["@pairs", "@after@*"], pm: base}
"""


def test_a_list_of_constitutions_trains_a_model_for_each_and_judges_all_models_by_each(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        for file in ("preference.yaml", "critique_revision.yaml"):
            (folder / name / file).write_text(f"kind: {name}\n")
    steps = by_name(planned(folder, CONSTITUTIONS, f"{HEAD}constitution: [a, b]\n"))
    two = ("@constitution=a", "@constitution=b")
    assert list(steps) == [
        "pairs", *(f"{name}{of}" for name in ("labels", "revisions", "dpo", "after", "judged") for of in two), "scored"
    ]  # fmt: skip
    assert str(steps["labels@constitution=b"].settings["constitution"]).endswith("/b/preference.yaml")
    assert str(steps["revisions@constitution=b"].settings["constitution"]).endswith("/b/critique_revision.yaml")
    for of in two:
        assert steps[f"judged{of}"].settings["input"] == ["out/pairs.jsonl", *(f"out/after{one}.jsonl" for one in two)]
    assert "constitution" not in steps["scored"].settings


def test_one_constitution_of_the_run_is_that_of_every_step_without_its_own(folder: Path) -> None:
    for name in ("a.yaml", "own.yaml"):
        (folder / name).write_text("kind: preference\n")
    text = CONSTITUTIONS.replace('input: "@pairs"}', 'input: "@pairs", constitution: own.yaml}', 1)
    steps = by_name(planned(folder, text, f"{HEAD}constitution: a.yaml\n"))
    assert str(steps["labels"].settings["constitution"]).endswith("/own.yaml")
    assert str(steps["judged"].settings["constitution"]).endswith("/a.yaml")


# --- the examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("example", "shared"), [("rounds", "before"), ("constitutions", "pairs")])
def test_the_examples_can_be_planned(example: str, shared: str) -> None:
    file = Path(__file__).parents[2] / f"examples/{example}.yaml"
    steps = plan(load_run(file), file, Path("out"))
    assert len([step for step in steps if step.name == shared]) == 1


# --- data of several files ----------------------------------------------------------------------------------------


def test_pairs_of_also_are_trained_on_like_those_of_the_input(cai: Cai, tmp_path: Path) -> None:
    tiny_model_dir(tmp_path / "tiny")
    write_rows(tmp_path / "new.jsonl", [preference(n, chosen=f"good {n}") for n in range(4)])
    write_rows(tmp_path / "old.jsonl", [preference(n, chosen=f"fine {n}") for n in range(6)])
    words = [
        "--model",
        "tiny",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--eval-share",
        "0",
        "--mix-ratio",
        "0",
        "--device",
        "cpu",
        "--quiet",
    ]
    done = cai("train-pm", "new.jsonl", "-o", "pm", "--also", "old.jsonl", "--also", "new.jsonl", *words)
    assert done.code == 0, done.stderr
    manifest = manifest_of(tmp_path / "pm")
    assert (manifest["counts"]["in"], manifest["counts"]["used"]) == (14, 14)
    assert set(manifest["provenance"]["input"]) == {"preferences", "also 1", "also 2"}
