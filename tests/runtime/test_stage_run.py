"""Every data stage conserves its rows, requests nothing twice and overwrites nothing."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Died, manifest_of, rows_in, sample_row, write_rows
from stage_cases import ALL, WORDS, prepare

from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.runtime.manifest import InputFile, hash_input
from cai_cli.runtime.stage_run import expected_items


@pytest.mark.parametrize("stage", WORDS)
def test_in_is_out_and_rejected_and_skipped_in_manifest_files_and_summary_line(
    stage: str, cai: Cai, inputs: Path
) -> None:
    done = cai(*prepare(stage, cai), "-o", "out.jsonl")
    assert done.code == 0, done.stderr
    assert done.stdout == ""
    counts = manifest_of(inputs / "out.jsonl")["counts"]
    assert counts["in"] == counts["out"] + counts["rejected"] + counts["skipped"] > 0
    assert counts["out"] == len(rows_in(inputs / "out.jsonl"))
    if stage == "revise":  # what failed its critique never came here
        assert not (inputs / "out.jsonl.rejected.jsonl").exists()
    else:
        rejected = rows_in(inputs / "out.jsonl.rejected.jsonl")
        assert counts["rejected"] == len(rejected) == (1 if stage == "label-prefs" else 2)
        assert all(json.loads(row["row"])["id"].startswith("p3") for row in rejected)
        assert sum(counts["rejected_reasons"].values()) == counts["rejected"]
    line = f"{stage}: {counts['in']} in = {counts['out']} out + {counts['rejected']} rejected"
    assert line in done.stderr
    left = {p.name for p in inputs.iterdir() if p.name.startswith("out.jsonl")}
    assert left <= {"out.jsonl", "out.jsonl.manifest.json", "out.jsonl.rejected.jsonl"}


def test_rows_do_not_depend_on_the_batch_size(cai: Cai, inputs: Path) -> None:
    for stage in ("sample", "critique-revise", "label-prefs"):
        for name, size in (("a.jsonl", "1"), ("b.jsonl", "64")):
            assert cai(*WORDS[stage], "-o", name, "--batch-size", size, "--overwrite").code == 0
        assert (inputs / "a.jsonl").read_bytes() == (inputs / "b.jsonl").read_bytes()


def test_finished_rows_that_are_no_longer_in_the_input_are_an_error(
    cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (inputs / "prompts.jsonl").read_bytes()
    words = ("sample", "-", *ALL, "-o", "out.jsonl", "--batch-size", "2")
    answer, calls = ScriptedEngine.generate, iter(range(2))

    def die(
        self: ScriptedEngine, asks: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion | RequestFailure]:
        if next(calls, None) is None:
            raise Died
        return answer(self, asks, sampling)

    monkeypatch.setattr(ScriptedEngine, "generate", die)
    with pytest.raises(Died):
        cai(*words, stdin=lines)
    monkeypatch.setattr(ScriptedEngine, "generate", answer)
    refused = cai(*words, stdin=lines.split(b"\n", 1)[1])
    assert (refused.code, refused.error) == (1, "input-changed")
    assert cai(*words, stdin=lines).code == 0
    assert len(rows_in(inputs / "out.jsonl")) == 9


def test_rejected_rows_can_be_requested_again(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "kind.jsonl", [{"replies": ["at last."], "scores": [-1.0, -2.0]}])
    for stage in ("sample", "critique-revise"):
        assert cai(*WORDS[stage], "-o", f"{stage}.jsonl").code == 0
        rejected = rows_in(inputs / f"{stage}.jsonl.rejected.jsonl")
        again = "".join(row["row"] + "\n" for row in rejected[:1])
        done = cai(stage, "-", "--model", "scripted:kind.jsonl", stdin=again.encode())
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["id"] == "p3"


def test_an_empty_input_makes_an_empty_output_and_a_warning(cai: Cai, inputs: Path) -> None:
    (inputs / "prompts.jsonl").write_text("")
    done = cai(*WORDS["sample"], "-o", "out.jsonl")
    assert done.code == 0
    assert "warning: sample: the input holds no rows" in done.stderr
    assert (inputs / "out.jsonl").read_bytes() == b""


def test_an_invalid_row_stops_the_run_at_its_line_and_a_fixed_input_is_another_run(cai: Cai, inputs: Path) -> None:
    with (inputs / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": NaN}\n')
    words = (*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "4")
    stopped = cai(*words)
    assert (stopped.code, stopped.error) == (1, "invalid-row")
    assert "prompts.jsonl:11" in stopped.stderr
    assert not (inputs / "out.jsonl").exists()
    write_rows(inputs / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(10)))
    assert cai(*words).error == "other-run"
    assert cai(*words, "--overwrite").code == 0


def test_a_process_substitution_is_read_once_and_whole(inputs: Path) -> None:
    line = f"{sys.executable} -m cai_cli sample <(cat prompts.jsonl) {' '.join(ALL)} -o out.jsonl --json"
    done = subprocess.run(["bash", "-c", line], cwd=inputs, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["in"] == 10


def test_text_that_steers_a_terminal_is_shown_harmless(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "prompts.jsonl", [{"prompt": "q", "\x1b[2J\u202e": 1}])
    shown = cai(*WORDS["sample"], "-o", "out.jsonl").stderr
    assert "left out" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("name", ["out.jsonl", "rejected.jsonl"])
def test_every_file_loads_with_datasets(name: str, cai: Cai, inputs: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    for stage in ("sample", "critique", "revise", "critique-revise", "label-prefs"):
        cai(*prepare(stage, cai), "-o", f"{stage}.jsonl", "--overwrite")
        path = inputs / (f"{stage}.jsonl" if name == "out.jsonl" else f"{stage}.jsonl.rejected.jsonl")
        if path.exists():
            data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(inputs / "cache"))
            assert data.to_list() == rows_in(path)


def test_a_seed_that_no_generator_takes_is_a_usage_error_and_leaves_nothing(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("why?\n")
    for seed in ("-1", str(2**32), str(10**30)):
        assert cai("sample", "prompts.txt", "-o", "out.jsonl", "--seed", seed).code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("output", ["out.jsonl", "-", "/dev/null"])
def test_a_run_that_rejects_every_row_fails_after_its_summary_and_fails_again(
    output: str, cai: Cai, tmp_path: Path
) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": [" "]}])
    (tmp_path / "prompts.txt").write_text("why?\n")
    for status in ("finished", "already finished" if output == "out.jsonl" else "finished"):
        done = cai("sample", "prompts.txt", "-o", output, "--model", "scripted:script.jsonl", "--json", "--quiet")
        assert (done.code, done.error) == (1, "all-rejected")
        summary = json.loads(done.stdout if output != "-" else done.stderr.splitlines()[1])
        assert (summary["status"], summary["out"], summary["rejected"]) == (status, 0, 1)
    assert (tmp_path / "out.jsonl.rejected.jsonl").exists() == (output == "out.jsonl")


def test_a_shard_that_skips_every_row_is_done(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "alone.jsonl", [sample_row(1)])
    done = cai("label-prefs", "alone.jsonl", *ALL, "-o", "out.jsonl", "--shard", "1/1")
    assert (done.code, "all 1 rows were skipped" in done.stderr) == (0, True)


@pytest.mark.parametrize(
    ("command", "rejected"),
    [
        (("red-team", "prompts.jsonl", "-n", "1"), 32),
        (("label-prefs", "samples.jsonl"), 10),
        (("eval", "harm", "samples.jsonl"), 20),
        (("eval", "compare", "a=samples.jsonl", "b=revised.jsonl", "--judge", "scripted:script.jsonl"), 10),
    ],
)
def test_every_stage_that_rejects_all_rows_exits_1(
    command: tuple[str, ...], rejected: int, cai: Cai, inputs: Path
) -> None:
    write_rows(inputs / "revised.jsonl", (sample_row(i, 0, "other") for i in range(10)))
    write_rows(inputs / "script.jsonl", [{"contains": "nothing holds this", "replies": ["x"]}])
    model = () if "--judge" in command else ALL
    done = cai(*command, *model, "-o", "out.jsonl")
    assert (done.code, done.error) == (1, "all-rejected"), done.stderr
    assert manifest_of(inputs / "out.jsonl")["counts"]["rejected"] == rejected


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 2, 50])
def test_the_total_of_the_progress_bar_is_at_most_the_file(limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("1\n2\n3")  # the last line lacks its newline
    file = hash_input(str(tmp_path / "rows.jsonl"))
    assert expected_items(file, limit, per_row=2) == 2 * min(3, limit or 3)
    assert expected_items(InputFile("-", None, None), limit) is None
