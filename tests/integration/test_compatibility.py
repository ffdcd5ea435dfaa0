"""Files that version 0.1.0 wrote are recognised, resumed, merged and read.

tests/data/v0.1.0/commands.json says which command made each of them. Every test works on a copy.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in

from cai_cli.common import legacy
from cai_cli.runtime.manifest import differences, read_manifest
from cai_cli.training.metrics_log import Metrics

DATA = Path(__file__).parent.parent / "data/v0.1.0"
COMMANDS: list[dict[str, Any]] = json.loads((DATA / "commands.json").read_text())
FINISHED = [c for c in COMMANDS if c["output"].startswith("finished/")]
PARTIAL = [c for c in COMMANDS if c["output"].startswith("partial/")]
RUNS = [c for c in COMMANDS if c["output"].startswith("run/")]
TRAINED = [c for c in COMMANDS if c["output"].startswith("models/")]
SIDECARS = ("rejected.jsonl", "units.jsonl")
RENAMED = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in legacy.OPTIONS.items()}
Files = dict[str, bytes]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of the files, in which `cai` runs."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    return tmp_path


def words_of(command: dict[str, Any], spelling: str) -> list[str]:
    """The command line, under the old option names or under today's."""
    words: list[str] = command["argv"][1:]
    return words if spelling == "old" else [RENAMED.get(word, word) for word in words]


def named(commands: list[dict[str, Any]]) -> Iterator[Any]:
    return (pytest.param(command, id=command["name"]) for command in commands)


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_group_of_files_is_there() -> None:
    assert (len(FINISHED), len(PARTIAL), len(RUNS), len(TRAINED)) == (14, 5, 2, 4)


# --- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("command", named(FINISHED))
def test_a_finished_output_is_recognised(command: dict[str, Any], spelling: str, cai: Cai, old: Path) -> None:
    before = files_of(old)
    done = cai(*words_of(command, spelling))
    assert done.code == 0, done.stderr
    assert f"{command['output']} is already finished; nothing to do" in done.stderr
    after = files_of(old)
    # A finished evaluation is summarised again from its rows: same values, intervals as this version computes them.
    for name in [n for n in before if n.endswith((".compare.json", ".harm.json"))]:
        assert values_in(json.loads(after.pop(name))).items() >= values_in(json.loads(before.pop(name))).items()
    assert after == before


def values_in(summary: Any, at: str = "") -> dict[str, Any]:
    """The summary of an evaluation without the ends of its intervals, by the place of each value."""
    if not isinstance(summary, dict | list):
        return {at: summary}
    parts = summary.items() if isinstance(summary, dict) else enumerate(summary)
    inner = [values_in(part, f"{at}.{name}") for name, part in parts if name not in ("low", "high")]
    return {place: value for values in inner for place, value in values.items()}


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("command", named(PARTIAL))
def test_a_partial_output_resumes_to_the_bytes_of_an_uninterrupted_run(
    command: dict[str, Any], spelling: str, cai: Cai, old: Path
) -> None:
    done = cai(*words_of(command, spelling))
    if command["argv"][1] in legacy.CHANGED_STAGES["0.2.0"]:
        assert (done.code, done.error) == (1, "other-run")
        return
    assert done.code == 0, done.stderr
    assert f"resuming {command['output']}.partial" in done.stderr
    output, expected = old / command["output"], old / command["expected"]
    assert output.read_bytes() == expected.read_bytes()
    for ending in SIDECARS:
        made, wanted = (path.with_name(f"{path.name}.{ending}") for path in (output, expected))
        assert made.exists() == wanted.exists()
        assert not made.exists() or made.read_bytes() == wanted.read_bytes()
    manifest, other = manifest_of(output), manifest_of(expected)
    for part in ("provenance", "counts", "rows"):  # of the version that started it
        assert manifest[part] == other[part]
    assert "is already finished" in cai(*words_of(command, spelling)).stderr


@pytest.mark.parametrize("replaced", ["none", "finished/sample-2of2.jsonl"])
def test_shards_merge_with_each_other_but_not_with_one_whose_version_writes_other_rows(
    replaced: str, cai: Cai, old: Path
) -> None:
    whole = next(c for c in FINISHED if "merge_of" in c)
    for path in old.glob(f"{replaced}*"):
        path.unlink()
    shard = next(c for c in FINISHED if c["name"] == "sample-shard-2")
    assert cai(*words_of(shard, "new")).code == 0
    merged = cai("merge", *whole["merge_of"], "-o", "merged.jsonl")
    if replaced != "none":
        assert (merged.code, merged.error) == (1, "other-run")
        return
    assert merged.code == 0
    for ending in ("", ".rejected.jsonl"):
        assert (old / f"merged.jsonl{ending}").read_bytes() == (old / f"{whole['output']}{ending}").read_bytes()
    words = ["merged.jsonl" if word == whole["output"] else word for word in words_of(whole, "new")]
    assert "is already finished" in cai(*words).stderr


def test_an_output_of_another_setting_or_of_an_unknown_version_is_refused(cai: Cai, old: Path) -> None:
    red_team = next(c for c in FINISHED if c["name"] == "red-team")
    refused = cai(*words_of(red_team, "new"), "--num-examples", "4")
    assert (refused.code, refused.error) == (1, "other-run")
    path = old / "finished/red-team.jsonl.manifest.json"
    path.write_text(path.read_text().replace('"cai": "0.1.0"', '"cai": "0.0.9"'))
    refused = cai(*words_of(red_team, "new"))
    assert (refused.code, refused.error) == (1, "other-run")
    assert "cai: 0.0.9 -> 0.2.0" in refused.stderr
    assert refused.stderr.count(" -> ") == 1


# --- manifests ----------------------------------------------------------------------------------------------------


def test_manifests_and_metrics_of_trained_models_have_todays_names(old: Path) -> None:
    manifest = read_manifest(old / "models/rl-cai.manifest.json")
    assert manifest
    assert "figures" not in manifest
    assert manifest["metrics"]["monitor_score"] == pytest.approx(-1.8859, abs=1e-4)
    assert "monitor_score_before" in manifest["metrics"]
    renamed = {k: v for k, v in manifest["provenance"].items() if k != "watcher"}
    renamed["monitor"] = manifest["provenance"]["watcher"]
    assert differences(manifest["provenance"], renamed) == []
    rows = Metrics(old / "models/rl-cai/metrics.jsonl", []).rows
    assert any(row["monitor_score"] is not None for row in rows)
    assert not any("watch_score" in row for row in rows)


# --- what only reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "stats"])
def test_every_file_of_rows_is_shown_and_counted(command: str, cai: Cai, old: Path) -> None:
    files = [p for p in old.rglob("*") if p.name.endswith((".jsonl", ".partial")) and p.name != "samples-one-bad.jsonl"]
    assert len(files) > 50
    for path in files:
        done = cai(command, str(path.relative_to(old)))
        assert done.code == 0, (path, done.stderr)
    unfinished = cai("show", "partial/sample.jsonl.partial")
    assert "an unfinished output of cai sample" in unfinished.stdout
    assert f"show: {len(rows_in(old / 'partial/sample.jsonl.partial'))} rows" in unfinished.stderr


@pytest.mark.parametrize("folder", ["run/out", "run/out-killed", "models", "finished"])
def test_the_report_reads_the_folder(folder: str, cai: Cai, old: Path) -> None:
    done = cai("report", folder)
    assert (done.code, done.stderr.count("warning")) == (0, 0), done.stderr
    page = (old / folder / "report.html").read_text()
    if folder == "models":
        assert "Score of the monitor model" in page
        assert "watch_score" not in page


def stage_of(output: Path) -> str | None:
    """The stage that wrote a file of rows; None for a sidecar."""
    manifest = read_manifest(output.with_name(f"{output.name}.manifest.json"))
    return manifest and manifest["provenance"]["stage"]


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", named(RUNS))
def test_a_run_folder_is_finished_or_completed(command: dict[str, Any], cai: Cai, old: Path) -> None:
    before = files_of(old / "run/out")
    done = cai(*words_of(command, "old"))
    killed = "killed_in" in command
    changed = legacy.CHANGED_STAGES["0.2.0"]
    if killed and "critique-revise" in changed:
        assert (done.code, done.error) == (1, "step-failed")  # as any unfinished output of a stage that changed
        for unfinished in (old / command["output"]).glob("*.partial*"):
            unfinished.unlink()
        done = cai(*words_of(command, "old"))
    assert done.code == 0, done.stderr
    assert done.stderr.count("already done: ") == (3 if killed else 7)
    assert done.stderr.count("] $ cai ") == (4 if killed else 0)
    after = files_of(old / command["output"])
    for name, content in before.items():
        if name.endswith(".jsonl") and not (killed and stage_of(old / "run/out" / name) in changed):
            assert after[name] == content, name
