"""Hostile ids and names in every stage and tool: none is ever used as a path."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Cai
from helpers import preference, revision, rows_in, sample_row, write_rows
from helpers import write_rows as write_bytes
from report_run import make_run
from tiny import tiny_model_dir

IDS = {
    "up": "../../x",
    "absolute": "/tmp/cai-canary/x",  # noqa: S108
    "home": "~/x",
    "long": "x" * 300,
    "very long": "x/" * 40_000,
    "nul": "a\0b",
    "device": "/dev/stdin",
    "newline": "a\nb",
    "windows": "..\\..\\CON",
    "dot": ".",
    "option": "--overwrite",
    "glob": "*",
    "url": "hf://datasets/x/y",
}
ALL_IDS = list(IDS.values())
SCRIPT = ("--model", "scripted:script.jsonl")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def room(tmp_path: Path, cai: Cai) -> Iterator[Path]:
    """A folder two levels down for all files; the folders above it stay empty."""
    inside = tmp_path / "deep/deeper"
    inside.mkdir(parents=True)
    write_rows(inside / "script.jsonl", [{"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]}])
    os.chdir(inside)
    yield inside
    assert {p for p in tree(tmp_path) if not p.startswith("deep/deeper/")} == {"deep", "deep/deeper"}
    assert not Path("/tmp/cai-canary").exists()  # noqa: S108
    assert not (Path.home() / "x").exists()


def prompts(ids: list[str]) -> list[dict[str, object]]:
    return [{"id": name, "prompt": f"question {k}"} for k, name in enumerate(ids)]


def outputs(folder: Path, *names: str) -> set[str]:
    """Which files are there beside those of the outputs `names`."""
    return {p for p in tree(folder) if not any(p == n or p.startswith((f"{n}.", f"{n}/")) for n in names)}


def test_every_data_stage_keeps_ids_and_creates_no_file_from_them(room: Path, cai: Cai) -> None:
    write_rows(room / "prompts.jsonl", prompts(ALL_IDS))
    write_rows(room / "levels.jsonl", [{"scores": [-1.0, -2.0, -3.0, -4.0, -5.0]}])
    made = ["prompts.jsonl", "script.jsonl", "levels.jsonl"]
    for name, words in {
        "samples.jsonl": ("sample", "prompts.jsonl", *SCRIPT, "--n", "2"),
        "critiques.jsonl": ("critique", "samples.jsonl", *SCRIPT),
        "revisions.jsonl": ("revise", "critiques.jsonl", *SCRIPT),
        "rounds.jsonl": ("critique-revise", "samples.jsonl", *SCRIPT, "--rounds", "2"),
        "preferences.jsonl": ("label-prefs", "samples.jsonl", *SCRIPT, "--one-order"),
        "harm.jsonl": ("eval", "harm", "samples.jsonl", "--model", "scripted:levels.jsonl"),
        "compare.jsonl": ("eval", "compare", "samples.jsonl", "revisions.jsonl", "--judge", "scripted:script.jsonl"),
        "sorted.jsonl": ("sort", "samples.jsonl", "--by", "length"),
        "distinct.jsonl": ("dedup", "samples.jsonl"),
    }.items():
        done = cai(*words, "-o", name)
        assert done.code == 0, done.stderr
        made.append(name)
        stem = name.removesuffix(".jsonl")
        made += [f"{stem}.compare.json", f"{stem}.harm.json"]
    assert outputs(room, *made) == set()
    for name in ("samples.jsonl", "revisions.jsonl", "harm.jsonl", "distinct.jsonl", "sorted.jsonl"):
        assert {row["id"] for row in rows_in(room / name)} == set(ALL_IDS)
    for tool in (
        ("stats", "samples.jsonl"),
        ("show", "samples.jsonl", "--id", "../../x"),
        ("eval", "agreement", "preferences.jsonl"),
    ):
        done = cai(*tool)
        assert done.code == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert cai("export", "preferences.jsonl", "-o", "ds").code == 0
    assert {p for p in tree(room / "ds") if "." in p} == {"README.md", "data/train-00000-of-00001.parquet"}


@pytest.mark.parametrize("name", IDS)
def test_a_rejected_row_keeps_its_id_in_the_one_rejected_file(name: str, room: Path, cai: Cai) -> None:
    write_rows(room / "script.jsonl", [{"replies": [""]}])
    write_rows(room / "prompts.jsonl", prompts([IDS[name]]))
    assert cai("sample", "prompts.jsonl", *SCRIPT, "-o", "out.jsonl").code == 1  # all rows are rejected
    (row,) = rows_in(room / "out.jsonl.rejected.jsonl")
    assert row["key"] == f"{IDS[name]}/0"
    assert outputs(room, "prompts.jsonl", "script.jsonl", "out.jsonl") == set()


def test_with_such_ids_resumed_and_merged_runs_equal_a_single_run(room: Path, cai: Cai) -> None:
    write_rows(room / "prompts.jsonl", prompts(ALL_IDS))
    assert cai("sample", "prompts.jsonl", *SCRIPT, "-o", "whole.jsonl").code == 0
    for k in (1, 2, 3):
        assert cai("sample", "prompts.jsonl", *SCRIPT, "-o", f"{k}.jsonl", "--shard", f"{k}/3").code == 0
    assert cai("merge", "1.jsonl", "2.jsonl", "3.jsonl", "-o", "merged.jsonl").code == 0
    assert (room / "merged.jsonl").read_bytes() == (room / "whole.jsonl").read_bytes()
    (room / "merged.jsonl").rename(room / "whole.jsonl.partial")
    assert cai("sample", "prompts.jsonl", *SCRIPT, "-o", "whole.jsonl").code == 0


@pytest.mark.parametrize("stage", ["sft", "train-pm", "rl", "dpo"])
def test_training_on_rows_with_such_ids_creates_the_model_and_nothing_else(stage: str, room: Path, cai: Cai) -> None:
    tiny_model_dir(room / "tiny")
    ids = [name for name in ALL_IDS if len(name) < 1000]
    write_bytes(room / "sft.jsonl", [revision(k) | {"id": name} for k, name in enumerate(ids)])
    write_bytes(room / "train-pm.jsonl", [preference(k) | {"id": name} for k, name in enumerate(ids)])
    write_rows(room / "rl.jsonl", prompts(ids))
    (room / "dpo.jsonl").write_bytes((room / "train-pm.jsonl").read_bytes())
    more = ("--max-steps", "1")
    if stage == "rl":
        done = cai("train-pm", "train-pm.jsonl", "-o", "pm", "--model", "tiny", "--max-steps", "1", "--eval-share", "0")
        assert done.code == 0, done.stderr
        more = (
            "--pm",
            "pm",
            "--steps",
            "1",
            "--prompts-per-step",
            "2",
            "--samples-per-prompt",
            "2",
            "--max-new-tokens",
            "4",
        )
    if stage == "dpo":
        more += ("--max-new-tokens", "4")
    done = cai(stage, f"{stage}.jsonl", "-o", "model", "--model", "tiny", *more)
    assert done.code == 0, done.stderr
    assert (
        outputs(room, "tiny", "pm", "model", "sft.jsonl", "train-pm.jsonl", "dpo.jsonl", "rl.jsonl", "script.jsonl")
        == set()
    )


# --- hostile names in files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in IDS if n != "long"])
def test_a_run_or_step_name_that_could_be_a_path_is_refused(name: str, room: Path, cai: Cai) -> None:
    write_rows(room / "prompts.jsonl", prompts(["a"]))
    step = {"command": "sample", "input": "prompts.jsonl"}
    for run_file in ({"name": IDS[name], "steps": {"s": step}}, {"name": "r", "steps": {IDS[name]: step}}):
        (room / "run.yaml").write_text(yaml.safe_dump({"model": "scripted:script.jsonl", **run_file}))
        done = cai("run", "run.yaml")
        assert done.code in (1, 2)
        assert "Traceback" not in done.stderr
    assert outputs(room, "prompts.jsonl", "script.jsonl", "run.yaml") == set()


def test_a_name_of_300_characters_is_one_line_of_error(room: Path, cai: Cai) -> None:
    write_rows(room / "prompts.jsonl", prompts(["a"]))
    step = {"command": "sample", "input": "prompts.jsonl"}
    for run_file in ({"name": "x" * 300, "steps": {"s": step}}, {"name": "r", "steps": {"x" * 300: step}}):
        (room / "run.yaml").write_text(yaml.safe_dump({"model": "scripted:script.jsonl", **run_file}))
        done = cai("run", "run.yaml")
        assert done.code in (1, 2)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")
    command = [sys.executable, "-m", "cai_cli", "sample", "prompts.jsonl", *SCRIPT, "-o", "x" * 300]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert "File name too long" in alone.stderr
    assert "Traceback" not in alone.stderr


def test_swept_values_become_names_without_folders(room: Path, cai: Cai) -> None:
    write_rows(room / "prompts.jsonl", prompts(["a"]))
    for folder in ("a", "b"):
        (room / folder).mkdir()
        write_rows(room / folder / "script.jsonl", [{"replies": ["x"]}])
    step = {
        "command": "sample",
        "input": "prompts.jsonl",
        "model": ["scripted:../deeper/a/script.jsonl", "scripted:b/script.jsonl"],
    }
    (room / "run.yaml").write_text(yaml.safe_dump({"name": "r", "steps": {"s": step}}))
    done = cai("run", "run.yaml", "--out", "out")
    assert done.code == 0, done.stderr
    assert all(path.parent == room / "out" for path in (room / "out").iterdir())
    assert len(list((room / "out").glob("s@model=*.jsonl"))) == 2


def test_principles_named_like_paths_are_names(room: Path, cai: Cai) -> None:
    principles = [{"id": name, "critique": "Say it.", "revision": "Do it."} for name in ALL_IDS]
    (room / "own.yaml").write_text(
        yaml.safe_dump({"kind": "critique-revision", "name": "../../x", "principles": principles})
    )
    write_rows(room / "samples.jsonl", [sample_row(k) for k in range(30)])
    done = cai("critique", "samples.jsonl", *SCRIPT, "-o", "out.jsonl", "--constitution", "own.yaml")
    assert done.code == 0, done.stderr
    assert cai("export", "out.jsonl", "-o", "ds").code == 0
    assert outputs(room, "own.yaml", "samples.jsonl", "script.jsonl", "out.jsonl", "ds") == set()


def test_the_report_of_a_hostile_run_reads_only_its_folder(room: Path, cai: Cai) -> None:
    """run.json and the manifests name outputs, inputs and constitutions: by paths, which are not followed."""
    run = make_run(room / "made")
    elsewhere = "A-ROW-FROM-ELSEWHERE"
    write_rows(room / "secret.jsonl", [sample_row(1, reply=elsewhere)])
    (room / "secret.jsonl.manifest.json").write_bytes((run / "samples.jsonl.manifest.json").read_bytes())
    (room / "secret.yaml").write_text(
        f"kind: preference\nname: {elsewhere}\nprinciples: [{{id: a, comparison: {elsewhere}}}]\n"
    )
    for number, path in enumerate([*ALL_IDS, "../secret.jsonl", str(room / "secret.jsonl")]):
        manifest = json.loads((run / "samples.jsonl.manifest.json").read_text())
        manifest["run"]["inputs"] = {"prompts": path}
        manifest["run"]["argv"] = ["cai", "sample", path, "-o", path, "--constitution", "../secret.yaml"]
        (run / f"step{number}.jsonl.manifest.json").write_text(json.dumps(manifest))
    record = json.loads((run / "run.json").read_text())
    for number, path in enumerate([*ALL_IDS, "../secret.jsonl", str(room / "secret.jsonl")]):
        record["steps"][f"more{number}"] = {
            "key": "k",
            "status": "done",
            "seconds": 1.0,
            "argv": ["sample", "in", "-o", path],
        }
        record["steps"][path] = {"key": "k", "status": "done", "seconds": 1.0, "argv": ["sample", "in"]}
    (run / "run.json").write_text(json.dumps(record))
    for argv in (["cai", "label-prefs", "--constitution", path] for path in ("a\0b", "../secret.yaml", "x" * 300)):
        manifest = json.loads((run / "preferences.jsonl.manifest.json").read_text())
        manifest["run"]["argv"] = argv
        (run / "preferences.jsonl.manifest.json").write_text(json.dumps(manifest))
        done = cai("report", "made")
        assert done.code == 0, done.stderr
        assert elsewhere not in (run / "report.html").read_text()
    assert outputs(room, "made", "secret.jsonl", "secret.yaml", "script.jsonl") == set()


def test_an_invalid_manifest_is_an_error_or_a_problem_and_not_a_traceback(room: Path, cai: Cai) -> None:
    write_rows(room / "samples.jsonl", [sample_row(1)])
    for text in ("[]", "1", '{"provenance": []}', '{"provenance": {}, "counts": null, "run": 3}', "\x00"):
        (room / "samples.jsonl.manifest.json").write_text(text)
        for words in (
            ("show", "samples.jsonl"), ("export", "samples.jsonl", "-o", "ds", "--overwrite"), ("report", "."),
            ("merge", "samples.jsonl", "-o", "merged.jsonl"), ("sort", "samples.jsonl", "-o", "sorted.jsonl", "--overwrite"),
            ("sample", "samples.jsonl", *SCRIPT, "-o", "samples.jsonl"), ("eval", "agreement", "samples.jsonl"),
        ):  # fmt: skip
            assert "Traceback" not in cai(*words).stderr, (text, words)
