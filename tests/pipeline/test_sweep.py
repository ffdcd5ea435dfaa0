"""Lists in a run file: which steps run once per value, which are shared, and how variants are compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai, Done
from helpers import Json, manifest_of, rows_in, sample_row, write_rows

from cai_cli.common.errors import UsageError
from cai_cli.pipeline.plan import plan
from cai_cli.pipeline.registry import takes_many
from cai_cli.pipeline.run_file import load_run
from cai_cli.pipeline.sweep import MAX_STEPS, expand, write_curves

PIPELINE = """\
name: pipeline
model: scripted:script.jsonl
steps:
  samples: {command: sample, input: prompts.jsonl, kind: red-team}
  revisions: {command: critique-revise, input: "@samples", rounds: [0, 1, 2], few-shot: none}
  again: {command: critique-revise, input: "@revisions", rounds: 1, few-shot: none}
  compare: {command: eval compare, input: ["@revisions@*"], judge: "scripted:script.jsonl"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(6)))
    replies = [f"this is reply number {i} and it says so." for i in range(20)]
    write_rows(tmp_path / "script.jsonl", [{"replies": replies, "scores": [-0.1, -3.0]}])
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def ran(done: Done) -> list[str]:
    """The steps whose command was started."""
    assert done.code == 0, done.stderr
    return [line.split("]")[0][1:] for line in done.stderr.splitlines() if "] $ cai " in line]


def expanded(**steps: Json) -> dict[str, Json]:
    return expand(steps, takes_many)


# --- expansion ---------------------------------------------------------------------------------------------------


def test_a_list_runs_its_step_and_dependent_steps_once_per_value_and_the_rest_once() -> None:
    flat = expanded(
        samples={"command": "sample", "input": "p.jsonl"},
        helpful={"command": "sample", "input": "h.jsonl"},
        prefs={"command": "label-prefs", "input": "@samples", "max-principles": [1, 4, None]},
        pm={"command": "train-pm", "input": "@prefs", "mix": "@helpful"},
        rl={"command": "rl", "input": "p.jsonl", "pm": "@pm"},
    )
    assert list(flat) == [
        "samples", "helpful",
        "prefs@max-principles=1", "prefs@max-principles=4", "prefs@max-principles=null",
        "pm@max-principles=1", "pm@max-principles=4", "pm@max-principles=null",
        "rl@max-principles=1", "rl@max-principles=4", "rl@max-principles=null",
    ]  # fmt: skip
    assert flat["pm@max-principles=4"] == {"command": "train-pm", "input": "@prefs@max-principles=4", "mix": "@helpful"}
    assert flat["rl@max-principles=null"]["pm"] == "@pm@max-principles=null"
    assert flat["prefs@max-principles=null"]["max-principles"] is None


def test_several_lists_are_a_product_and_a_step_that_reads_both_gets_matching_values() -> None:
    flat = expanded(
        a={"command": "label-prefs", "input": "s.jsonl", "clamp": ["0.4,0.6", "0,1"]},
        b={"command": "train-pm", "input": "@a", "lora": [True, False]},
        c={"command": "train-pm", "input": "@a"},
        d={"command": "rl", "input": "p.jsonl", "model": "@b", "pm": "@c"},
    )
    assert len(flat) == 2 + 4 + 2 + 4
    assert flat["d@clamp=0.4,0.6@lora=true"] == {
        "command": "rl", "input": "p.jsonl", "model": "@b@clamp=0.4,0.6@lora=true", "pm": "@c@clamp=0.4,0.6",
    }  # fmt: skip


def test_one_set_of_votes_serves_all_clamps() -> None:
    flat = expanded(
        a={
            "command": "label-prefs",
            "input": "s.jsonl",
            "method": ["cot", "choice"],
            "clamp": ["0.1,0.9", "0,1", "0.4,0.6"],
        },
        b={"command": "label-prefs", "input": "s.jsonl", "votes": "old.jsonl", "clamp": ["0,1", "0.4,0.6"]},
        c={"command": "label-prefs", "input": "s.jsonl", "clamp": [None, "0.4,0.6", "nonsense"]},
    )
    assert {name: step["votes"] for name, step in flat.items() if "votes" in step} == {
        "a@method=cot@a.clamp=0,1": "@a@method=cot@a.clamp=0.1,0.9",
        "a@method=cot@a.clamp=0.4,0.6": "@a@method=cot@a.clamp=0.1,0.9",
        "a@method=choice@a.clamp=0,1": "@a@method=choice@a.clamp=0.1,0.9",
        "a@method=choice@a.clamp=0.4,0.6": "@a@method=choice@a.clamp=0.1,0.9",
        "b@b.clamp=0,1": "old.jsonl",
        "b@b.clamp=0.4,0.6": "old.jsonl",
        "c@c.clamp=0.4,0.6": "@c@c.clamp=null",
        "c@c.clamp=nonsense": "@c@c.clamp=null",
    }


def test_one_setting_swept_in_two_steps_is_named_with_its_step() -> None:
    flat = expanded(
        a={"command": "sample", "input": "p.jsonl", "seed": [0, 1]},
        b={"command": "critique-revise", "input": "@a", "seed": [2, 3]},
    )
    assert list(flat)[2:] == [
        "b@a.seed=0@b.seed=2", "b@a.seed=1@b.seed=2", "b@a.seed=0@b.seed=3", "b@a.seed=1@b.seed=3",
    ]  # fmt: skip


def test_a_swept_reference_reads_each_step_with_the_values_of_that_step_alone() -> None:
    flat = expanded(
        prefs={"command": "label-prefs", "input": "s.jsonl", "seed": [0, 1]},
        pm={"command": "train-pm", "input": "@prefs"},
        rl={"command": "rl", "input": "p.jsonl", "pm": ["@pm", "other/pm"]},
    )
    assert list(flat)[4:] == ["rl@seed=0@pm=pm", "rl@seed=1@pm=pm", "rl@pm=other-pm"]
    assert [flat[name]["pm"] for name in list(flat)[4:]] == ["@pm@seed=0", "@pm@seed=1", "other/pm"]


def test_an_option_that_takes_several_values_can_name_all_variants() -> None:
    steps = {
        "start": {"command": "sample", "input": "p.jsonl"},
        "rev": {"command": "critique-revise", "input": "@start", "critique": [True, False]},
    }
    flat = expanded(**steps, both={"command": "eval compare", "input": ["base=@start", "@rev@*", "old=x.jsonl"]})
    assert flat["both"]["input"] == ["base=@start", "@rev@critique=true", "@rev@critique=false", "old=x.jsonl"]
    flat = expanded(**steps, each={"command": "eval compare", "input": ["@start", "@rev"]})
    assert list(flat)[3:] == ["each@critique=true", "each@critique=false"]
    assert flat["each@critique=false"]["input"] == ["@start", "@rev@critique=false"]
    assert expanded(**steps, all={"command": "eval compare", "input": "@rev@*"})["all"]["input"] == [
        "@rev@critique=true", "@rev@critique=false",
    ]  # fmt: skip


def test_more_rounds_continue_from_fewer_in_any_order() -> None:
    flat = expanded(
        s={"command": "sample", "input": "p.jsonl"},
        r={"command": "critique-revise", "input": "@s", "rounds": [4, 0, 1], "critique": [True, False]},
    )
    assert [(n, step["input"], step["rounds"]) for n, step in flat.items() if step["command"] != "sample"][::2] == [
        ("r@rounds=0@critique=true", "@s", 0),
        ("r@rounds=1@critique=true", "@r@rounds=0@critique=true", 1),
        ("r@rounds=4@critique=true", "@r@rounds=1@critique=true", 3),
    ]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"a": {"command": "sample", "input": "p", "n": []}}, "step 'a': n: a list needs one or more distinct values"),
        ({"a": {"command": "sample", "input": "p", "n": [1, 1]}}, "one or more distinct values"),
        ({"a": {"command": "sample", "input": ["x/y", "x y"]}}, "one or more distinct values"),
        ({"a": {"command": "sample", "input": "p", "principles": ["x" * 200]}}, "is too long for a file"),
        ({"a": {"command": "sample", "input": "p", "n": list(range(999))}}, f"more than {MAX_STEPS} steps"),
        ({"a": {"command": "sample", **{f"o{i}": list(range(9)) for i in range(9)}}}, f"more than {MAX_STEPS} steps"),
    ],
)
def test_lists_that_cannot_be_run_are_refused(steps: Json, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        expanded(**steps)
    assert error.value.code == "invalid-run-file"


def test_names_and_references_reach_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write_rows(folder / "old.jsonl", [sample_row(1)])
    text = PIPELINE.replace('"@revisions@*"', 'old=old.jsonl, "new=@revisions@rounds=2"')
    (folder / "pipeline.yaml").write_text(text)
    *_, compare = plan(load_run(Path("pipeline.yaml")), Path("pipeline.yaml"), Path("out"))
    assert compare.shell == (
        "cai eval compare old=old.jsonl new=out/revisions@rounds=2.jsonl -o out/compare.jsonl"
        " --judge scripted:script.jsonl --seed 0"
    )
    assert [need.name for need in compare.needs] == ["revisions@rounds=2"]
    assert list(compare.files) == ["input"]
    (folder / "pipeline.yaml").write_text(PIPELINE.replace("@revisions@*", "@revisions@rounds=7"))
    with pytest.raises(UsageError) as error:
        plan(load_run(Path("pipeline.yaml")), Path("pipeline.yaml"), Path("out"))
    assert error.value.code == "unknown-step"
    assert "'revisions@rounds=7'" in error.value.message


# --- the run ------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_shared_steps_once_and_a_new_value_runs_only_the_steps_it_needs(folder: Path, cai: Cai) -> None:
    def run(rounds: str) -> Done:
        few = [line for line in PIPELINE.replace("[0, 1, 2]", rounds).splitlines() if not line.startswith("  again:")]
        (folder / "pipeline.yaml").write_text("\n".join(few))
        return cai("run", "pipeline.yaml", "--out", "out")

    first = run("[0, 2]")
    assert ran(first) == ["samples", "revisions@rounds=0", "revisions@rounds=2", "compare"]
    assert "the lists of pipeline.yaml expand its 3 steps to 4" in first.stderr
    out = folder / "out"
    assert (out / "revisions@rounds=0.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()
    assert manifest_of(out / "compare.jsonl")["counts"]["in"] == 6
    two_at_once = rows_in(out / "revisions@rounds=2.jsonl")
    assert {len(row["history"]) for row in two_at_once} == {2}

    # Two runs of one round give the rows of one run of two rounds.
    assert ran(run("[0, 1, 2]")) == ["revisions@rounds=1", "revisions@rounds=2", "compare"]
    assert rows_in(out / "revisions@rounds=2.jsonl") == two_at_once
    assert ran(run("[0, 1, 2]")) == []


def test_a_dry_run_counts_the_steps_of_a_sweep_and_runs_none(folder: Path, cai: Cai) -> None:
    done = cai("run", "pipeline.yaml", "--dry-run", "--json", "--out", "out")
    assert done.code == 0, done.stderr
    found = {e["step"]: e for e in json.loads(done.stdout)}
    assert "the lists of pipeline.yaml expand its 4 steps to 8" in done.stderr
    assert {name: (e["rows"], e["requests"]) for name, e in found.items()} == {
        "samples": (6, 6),
        "revisions@rounds=0": (6, 0), "revisions@rounds=1": (6, 12), "revisions@rounds=2": (6, 12),
        "again@rounds=0": (6, 12), "again@rounds=1": (6, 12), "again@rounds=2": (6, 12),
        "compare": (18, 36),
    }  # fmt: skip
    assert not (folder / "out").exists()


def test_the_variants_of_a_numbered_sweep_become_a_curve(tmp_path: Path) -> None:
    def ratings_of(*models: str) -> list[Json]:
        return [{"model": m, "value": float(i), "low": i - 1.0, "high": i + 1.0, "n": 9} for i, m in enumerate(models)]

    def curves(ratings: list[Json], scores: list[Json]) -> dict[str, Any]:
        found = {"ratings": {"harmless": ratings, "helpful": []}, "scores": {"harmless": scores, "helpful": []}}
        (tmp_path / "c.jsonl.compare.json").write_text(json.dumps(found | {"simultaneous": {"scores": 3}}))
        write_curves([tmp_path / "c.jsonl", tmp_path / "none.jsonl"])
        return {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.sweep.json")}

    assert curves(ratings_of("start", "x@critique=true", "y@rounds=1"), []) == {}
    models = ("r@rounds=10", "r@rounds=2", "start", "r@clamp=0.4,0.6")
    (name, curve), = curves(ratings_of(*models), ratings_of(*models)).items()  # fmt: skip
    assert name == "c.r.harmless.sweep.json"
    assert (curve["setting"], curve["figure"]) == ("rounds", "PM score, harmless")
    assert curve["points"] == [
        {"at": 2.0, "value": 1.0, "low": 0.0, "high": 2.0, "n": 9},
        {"at": 10.0, "value": 0.0, "low": -1.0, "high": 1.0, "n": 9},
    ]
    assert curves(ratings_of(*models), [])[name]["figure"] == "Elo, harmless"
    assert curve["simultaneous"] == 3


ABLATIONS = sorted((Path(__file__).parents[2] / "examples/ablations").glob("*.yaml"))


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_each_of_the_paper_s_ablations_can_be_planned_and_compares_all_its_variants(file: Path, cai: Cai) -> None:
    done = cai("run", str(file), "--dry-run", "--json")
    assert done.code == 0, done.stderr
    found = {e["step"]: e["command"] for e in json.loads(done.stdout)}
    gathered = "after" if file.stem == "labels" else "revisions"
    variants = [name for name in found if name.startswith(f"{gathered}@")]
    assert len(variants) >= 3
    assert all(f"{variant}.jsonl" in found["compare"] for variant in variants)


def test_the_ablations_evaluate_on_prompts_that_no_step_trains_on() -> None:
    examples = Path(__file__).parents[2] / "examples"
    held_out = {row["id"] for row in rows_in(examples / "evaluation.jsonl")}
    assert len(held_out) == 32
    for file in ABLATIONS:
        for name, given in load_run(file).steps.items():
            if not str(given["input"]).startswith(("@", "['@", "../evaluation")):
                used = rows_in((file.parent / str(given["input"])).resolve())[: int(str(given["limit"]))]
                assert not held_out & {row["id"] for row in used}, name
