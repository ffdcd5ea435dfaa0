"""Shards of a run merged are the run: the same bytes, counts and provenance; anything else is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import UsageError
from cai_cli.data.sharding import Shard

SCRIPT = ("--model", "scripted:script.jsonl")
WORDS = {
    "sample": ("sample", "prompts.jsonl", *SCRIPT, "-n", "2", "--skip-invalid"),
    "critique": ("critique", "scattered.jsonl", *SCRIPT),
    "revise": ("revise", "critiques.jsonl", *SCRIPT),
    "critique-revise": ("critique-revise", "scattered.jsonl", *SCRIPT, "--rounds", "2", "--limit", "30"),
    "label-prefs": ("label-prefs", "samples.jsonl", *SCRIPT, "--one-order", "--skip-invalid"),
}
SIDE = ("", ".rejected.jsonl")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Prompts with bad lines and repeats, samples of one prompt together and scattered, a script that fails some."""
    prompts: list[Json] = [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(40)]
    lines = [json.dumps(row) for row in [*prompts, {"prompt": "again"}, {"prompt": "again"}]]
    lines[7:7] = ["not JSON", '{"prompt": 3}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    samples = [sample_row(i, k) for i in range(20) for k in range(3)]
    samples[9] |= {"completion": samples[10]["completion"]}
    write_rows(tmp_path / "scattered.jsonl", sorted(samples, key=lambda row: row["sample_index"]))
    lines = [json.dumps(row) for row in samples]
    lines[4:4] = ["{"]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    script = [
        {"contains": "question 3", "replies": [""], "scores": [-1.0, -1.0]},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]},
    ]
    write_rows(tmp_path / "script.jsonl", script)
    return tmp_path


def run_shards(cai: Cai, words: tuple[str, ...], count: int, ending: str = "jsonl") -> list[str]:
    names = [f"s{i}.{ending}" for i in range(1, count + 1)]
    for i, name in enumerate(names, 1):
        done = cai(*words, "--shard", f"{i}/{count}", "-o", name, "--batch-size", str(i))
        assert done.code == 0, done.stderr
    return names


@pytest.mark.parametrize("stage", WORDS)
def test_shards_merged_in_any_order_are_the_whole_run_to_the_byte(stage: str, cai: Cai, inputs: Path) -> None:
    if stage == "revise":
        assert cai(*WORDS["critique"], "-o", "critiques.jsonl").code == 0
    assert cai(*WORDS[stage], "-o", "whole.jsonl").code == 0
    names = run_shards(cai, WORDS[stage], 3)
    assert all(rows_in(inputs / name) for name in names), "a shard without rows proves little"
    done = cai("merge", *reversed(names), "-o", "merged.jsonl", "--json")
    assert done.code == 0, done.stderr
    for side in SIDE:
        whole, merged = inputs / f"whole.jsonl{side}", inputs / f"merged.jsonl{side}"
        assert whole.exists() == merged.exists()
        assert not whole.exists() or whole.read_bytes() == merged.read_bytes()
    for part in ("provenance", "counts", "rows"):
        assert manifest_of(inputs / "merged.jsonl")[part] == manifest_of(inputs / "whole.jsonl")[part]
    assert {k: v for k, v in json.loads(done.stdout).items() if k in ("in", "out", "rejected", "skipped")} == {
        k: v for k, v in manifest_of(inputs / "whole.jsonl")["counts"].items() if not k.endswith("reasons")
    }
    assert "nothing to do" in cai(*WORDS[stage], "-o", "merged.jsonl").stderr
    assert not list(inputs.glob("merged.jsonl*units*"))


def test_sixteen_processes_make_sixteen_shards_and_together_the_run_of_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(500)))
    write_rows(tmp_path / "script.jsonl", [{"replies": [f"reply {i}." for i in range(9)]}])

    def start(*words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "cai_cli", "sample", "prompts.jsonl", *SCRIPT, "-n", "2", "-q", *words]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})

    running = [start("-o", "whole.jsonl")]
    running += [start("--shard", f"{i}/16", "-o", f"s{i}.jsonl") for i in range(1, 17)]
    assert [child.wait(timeout=120) for child in running] == [0] * 17
    merge = [sys.executable, "-m", "cai_cli", "merge", *(f"s{i}.jsonl" for i in range(1, 17)), "-o", "merged.jsonl"]
    subprocess.run(merge, cwd=tmp_path, check=True, timeout=60)
    assert len(rows_in(tmp_path / "merged.jsonl")) == 1000
    assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_shard_without_rows_is_a_shard(cai: Cai, inputs: Path) -> None:
    words = ("sample", "prompts.jsonl", *SCRIPT, "--limit", "1", "-n", "2")
    assert cai(*words, "-o", "whole.jsonl").code == 0
    names = run_shards(cai, words, 3)
    assert sorted(len(rows_in(inputs / name)) for name in names) == [0, 0, 2]
    assert cai("merge", *names, "-o", "merged.jsonl").code == 0
    assert (inputs / "merged.jsonl").read_bytes() == (inputs / "whole.jsonl").read_bytes()


def test_a_missing_a_doubled_and_a_foreign_shard_are_refused_by_name(cai: Cai, inputs: Path) -> None:
    names = run_shards(cai, WORDS["sample"], 4)
    missing = cai("merge", names[0], names[2], "-o", "m.jsonl")
    assert (missing.code, "2 of 4 shards are missing: 2/4, 4/4" in missing.stderr) == (1, True)
    (inputs / "copy.jsonl").write_bytes((inputs / names[1]).read_bytes())
    for side in ("manifest.json", "units.jsonl"):
        (inputs / f"copy.jsonl.{side}").write_bytes((inputs / f"{names[1]}.{side}").read_bytes())
    twice = cai("merge", *names, "copy.jsonl", "-o", "m.jsonl")
    assert (twice.code, "s2.jsonl and copy.jsonl are both shard 2/4" in twice.stderr) == (1, True)
    assert cai(*WORDS["sample"], "--seed", "5", "--shard", "1/4", "-o", "foreign.jsonl").code == 0
    foreign = cai("merge", "foreign.jsonl", *names[1:], "-o", "m.jsonl")
    assert foreign.code == 1
    assert "foreign.jsonl is from another run than the other shards: settings.seed: 0 -> 5" in foreign.stderr
    assert cai(*WORDS["sample"], "--shard", "1/3", "-o", "third.jsonl").code == 0
    assert "third.jsonl is from another run" in cai("merge", "third.jsonl", *names[1:], "-o", "m.jsonl").stderr
    assert cai(*WORDS["sample"], "-o", "whole.jsonl").code == 0
    assert "whole.jsonl is not a shard" in cai("merge", *names, "whole.jsonl", "-o", "m.jsonl").stderr
    assert "none.jsonl does not exist" in cai("merge", "none.jsonl", "-o", "m.jsonl").stderr
    assert not (inputs / "m.jsonl").exists()


def test_shards_that_read_other_rows_from_a_pipe_are_not_merged(cai: Cai, inputs: Path) -> None:
    lines = (inputs / "scattered.jsonl").read_bytes()
    for i, given_lines in ((1, lines), (2, lines), (3, lines.replace(b"reply 2 to 9", b"reply 2 to nine"))):
        assert cai("critique", "-", *SCRIPT, "--shard", f"{i}/3", "-o", f"s{i}.jsonl", stdin=given_lines).code == 0
    refused = cai("merge", "s1.jsonl", "s2.jsonl", "s3.jsonl", "-o", "m.jsonl")
    assert refused.code == 1
    assert "s3.jsonl is from another run than the other shards: rows.sha256" in refused.stderr


@pytest.mark.parametrize("change", ["drop", "add", "swap"])
def test_a_shard_that_was_changed_since_it_was_made_is_refused(change: str, cai: Cai, inputs: Path) -> None:
    names = run_shards(cai, WORDS["sample"], 2)
    lines = (inputs / names[1]).read_bytes().splitlines(keepends=True)
    extra = json.dumps(sample_row(99)).encode() + b"\n"
    changed = {"drop": lines[:-1], "add": [*lines, extra], "swap": [lines[1], lines[0], *lines[2:]]}[change]
    (inputs / names[1]).write_bytes(b"".join(changed))
    refused = cai("merge", *names, "-o", "m.jsonl")
    assert refused.code == 1
    assert f"error: {names[1]}: " in refused.stderr
    assert "a file has been changed" in refused.stderr
    assert not (inputs / "m.jsonl").exists()


def test_a_merge_that_was_broken_off_is_done_again_and_another_output_is_not_replaced(cai: Cai, inputs: Path) -> None:
    names = run_shards(cai, WORDS["sample"], 2)
    assert cai("merge", *names, "-o", "m.jsonl").code == 0
    whole = (inputs / "m.jsonl").read_bytes()
    draft = {**manifest_of(inputs / "m.jsonl"), "status": "running"}
    (inputs / "m.jsonl.partial.manifest.json").write_text(json.dumps(draft))
    (inputs / "m.jsonl.manifest.json").unlink()
    (inputs / "m.jsonl").rename(inputs / "m.jsonl.partial")
    assert cai("merge", *names, "-o", "m.jsonl").code == 0
    assert (inputs / "m.jsonl").read_bytes() == whole
    assert "nothing to do" in cai("merge", *names, "-o", "m.jsonl").stderr
    assert cai(*WORDS["sample"], "--seed", "5", "-o", "other.jsonl").code == 0
    assert "settings.seed: 5 -> 0" in cai("merge", *names, "-o", "other.jsonl").stderr


@given(st.text(), st.integers(1, 40))
def test_every_id_is_in_exactly_one_shard(prompt_id: str, count: int) -> None:
    assert [Shard(i, count).contains(prompt_id) for i in range(1, count + 1)].count(True) == 1


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/4/2", "1.5/4"])
def test_a_shard_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="I/N"):
        Shard.parse(text)


def test_a_shard_with_a_line_that_no_run_wrote_is_refused_by_name(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["yes"]}])
    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(8)))
    for i in (1, 2):
        out = f"s{i}.jsonl"
        assert (
            cai("sample", "prompts.txt", "-o", out, "--shard", f"{i}/2", "--model", "scripted:script.jsonl").code == 0
        )
    with (tmp_path / "s1.jsonl").open("a") as file:
        file.write("x\n")
    refused = cai("merge", "s1.jsonl", "s2.jsonl", "-o", "whole.jsonl")
    assert refused.code == 1
    assert "s1.jsonl" in refused.stderr
    assert "Traceback" not in refused.stderr
