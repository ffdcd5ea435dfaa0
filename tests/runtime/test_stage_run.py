"""What every data stage promises of its files: rows are conserved, nothing is asked twice, nothing is overwritten."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Died, manifest_of, options_that, rows_in, sample_row, write_rows

from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure, Sampling
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.pipeline.registry import STAGES
from cai_cli.runtime.config import Effect
from cai_cli.runtime.manifest import InputFile, hash_input
from cai_cli.runtime.stage import Phase
from cai_cli.runtime.stage_run import expected_items

ALL = ("--model", "scripted:script.jsonl")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Ten prompts, two replies to each, and a script that fails question 3 and ties or refuses nothing else."""
    write_rows(tmp_path / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(10)))
    write_rows(tmp_path / "samples.jsonl", (sample_row(i, k) for i in range(10) for k in range(2)))
    script = [
        {"contains": "question 3", "replies": [""]},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]},
    ]
    write_rows(tmp_path / "script.jsonl", script)
    return tmp_path


WORDS = {
    "sample": ("sample", "prompts.jsonl", *ALL, "-n", "2"),
    "critique": ("critique", "samples.jsonl", *ALL),
    "revise": ("revise", "critiques.jsonl", *ALL),
    "critique-revise": ("critique-revise", "samples.jsonl", *ALL, "--rounds", "2"),
    "label-prefs": ("label-prefs", "samples.jsonl", *ALL, "--one-order"),
}


def prepare(stage: str, cai: Cai) -> tuple[str, ...]:
    if stage == "revise":
        assert cai(*WORDS["critique"], "-o", "critiques.jsonl").code == 0
    return WORDS[stage]


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


@pytest.mark.parametrize("stage", WORDS)
def test_every_option_that_decides_the_output_is_recorded(stage: str, cai: Cai, inputs: Path) -> None:
    # score has no script to answer for its model, and red-team makes rows instead of taking them: see their tests.
    data = {name for name, s in STAGES.items() if not s.trains and s.phase is not Phase.EVALUATION}
    assert set(WORDS) == data - {"score", "red-team"}
    cai(*prepare(stage, cai), "-o", "out.jsonl")
    recorded = set(manifest_of(inputs / "out.jsonl")["provenance"]["settings"])
    assert recorded == options_that(stage, Effect.DECIDES)
    assert {"seed", "prompt_format", "limit", "dtype"} <= recorded


# What decides the content of an output of any stage. A new option belongs here, or is declared as harmless or recorded
# by hash: this list makes sure that somebody decided.
CONTENT_OPTIONS = frozenset(
    [
        *("n", "kind", "topics", "num_examples", "start_words", "similarity", "rounds", "critique", "method"),
        *("both_orders", "pairs", "principles_per_pair", "cot_samples", "clamp", "calibrate", "min_confidence"),
        *("principles", "max_principles", "max_new_tokens", "temperature", "top_p", "prompt_format", "seed", "limit"),
        *("shard", "dtype", "helpful_ratio", "revisions", "epochs", "max_steps", "batch_size", "learning_rate"),
        *("max_length", "lora", "lora_rank", "eval_share", "mix_ratio", "targets", "fit_head", "algorithm", "beta"),
        *("steps", "prompts_per_step", "samples_per_prompt", "cutoff_penalty", "held_out", "monitor_every"),
        "stop_on_goodhart",
    ]
)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_only_the_listed_options_decide_the_output(stage: str) -> None:
    assert options_that(stage, Effect.DECIDES) <= CONTENT_OPTIONS


@pytest.mark.parametrize(
    "change", [("--batch-size", "3"), ("--device", "cpu"), ("--skip-invalid", "--max-invalid", "3")]
)
def test_a_partial_output_goes_on_under_other_harmless_settings(
    change: tuple[str, ...], cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cai_cli.runtime.sinks.FileSink.finish", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            cai(*WORDS["sample"], "-o", "out.jsonl")
    again = cai(*WORDS["sample"], *change, "-o", "out.jsonl")
    assert again.code == 0
    assert "20 rows are finished" in again.stderr


def test_settings_that_only_say_how_fast_do_not_make_another_run(cai: Cai, inputs: Path) -> None:
    first = cai(*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "3")
    again = cai(*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "5", "--device", "cpu")
    assert (first.code, again.code) == (0, 0)
    assert "nothing to do" in again.stderr


def test_rows_do_not_depend_on_the_batch_size(cai: Cai, inputs: Path) -> None:
    for stage in ("sample", "critique-revise", "label-prefs"):
        for name, size in (("a.jsonl", "1"), ("b.jsonl", "64")):
            assert cai(*WORDS[stage], "-o", name, "--batch-size", size, "--overwrite").code == 0
        assert (inputs / "a.jsonl").read_bytes() == (inputs / "b.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("stage", "change", "named"),
    [
        ("sample", ("--seed", "9"), "settings.seed: 0 -> 9"),
        ("sample", ("-n", "3"), "settings.n: 2 -> 3"),
        ("sample", ("--kind", "helpful"), "settings.kind: nothing -> helpful"),
        ("critique", ("--temperature", "0.1"), "settings.temperature: 1.0 -> 0.1"),
        ("critique-revise", ("--no-critique",), "settings.critique: True -> False"),
        ("critique-revise", ("--few-shot", "none"), "constitution.fingerprint: "),
        ("critique-revise", ("--constitution", "mine.yaml"), "constitution.name: cai-critique-revision -> mine"),
        ("label-prefs", ("--both-orders",), "settings.both_orders: False -> True"),
        ("label-prefs", ("--model", "scripted:other.jsonl"), "model.fingerprint: "),
        ("label-prefs", ("--principles", "least-damage"), "settings.principles: nothing -> least-damage"),
    ],
)
def test_a_finished_output_of_another_run_is_refused_and_kept(
    stage: str, change: tuple[str, ...], named: str, cai: Cai, inputs: Path
) -> None:
    write_rows(inputs / "other.jsonl", [{"replies": ["else"], "scores": [-1.0, -2.0]}])
    mine = "kind: critique-revision\nname: mine\nprinciples:\n- {id: a, critique: Look., revision: Rewrite.}\n"
    (inputs / "mine.yaml").write_text(mine)
    assert cai(*WORDS[stage], "-o", "out.jsonl").code == 0
    before = (inputs / "out.jsonl").read_bytes()
    refused = cai(*WORDS[stage], *change, "-o", "out.jsonl")
    assert refused.code == 1
    assert named in refused.stderr
    assert "hint: --overwrite" in refused.stderr
    assert (inputs / "out.jsonl").read_bytes() == before
    all_tie = change == ("--both-orders",)  # the script has one answer to both orders
    assert cai(*WORDS[stage], *change, "-o", "out.jsonl", "--overwrite").code == all_tie
    assert manifest_of(inputs / "out.jsonl")["counts"]["in"] > 0


def test_a_file_cai_did_not_make_is_never_replaced_unasked(cai: Cai, inputs: Path) -> None:
    for name in ("out.jsonl", "out.jsonl.partial"):
        (inputs / name).write_text("mine\n")
        refused = cai(*WORDS["sample"], "-o", "out.jsonl")
        assert refused.code == 1
        assert "manifest" in refused.stderr
        assert (inputs / name).read_text() == "mine\n"
        (inputs / name).unlink()


def test_overwrite_leaves_nothing_of_the_run_before(cai: Cai, inputs: Path) -> None:
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    assert (inputs / "out.jsonl.rejected.jsonl").exists()
    assert cai("sample", "prompts.jsonl", *ALL, "--limit", "1", "-o", "out.jsonl", "--overwrite").code == 0
    assert len(rows_in(inputs / "out.jsonl")) == 1
    assert not (inputs / "out.jsonl.rejected.jsonl").exists()


@pytest.mark.parametrize("moment", ["before the output is renamed", "before the manifest is renamed"])
def test_a_run_that_dies_while_publishing_is_completed_without_asking_again(
    moment: str, cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        name = Path(target).name
        if name == ("out.jsonl" if "output" in moment else "out.jsonl.manifest.json"):
            raise Died
        replace(source, target)

    assert cai(*WORDS["sample"], "-o", "calm.jsonl").code == 0
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Died):
        cai(*WORDS["sample"], "-o", "out.jsonl")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("cai_cli.phase1_supervised.sample.sample", None)  # asking again would call it
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    assert (inputs / "out.jsonl").read_bytes() == (inputs / "calm.jsonl").read_bytes()
    assert manifest_of(inputs / "out.jsonl")["counts"] == manifest_of(inputs / "calm.jsonl")["counts"]
    assert not list(inputs.glob("*.partial*"))


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
    assert refused.code == 1
    assert "1 finished rows that are not in this input" in refused.stderr
    assert cai(*words, stdin=lines).code == 0
    assert len(rows_in(inputs / "out.jsonl")) == 9


def test_json_prints_one_object_and_it_is_the_manifest_in_short(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "out.jsonl", "--json")
    summary = json.loads(done.stdout)
    assert done.stderr == ""
    counts = manifest_of(inputs / "out.jsonl")["counts"]
    assert {k: summary[k] for k in counts} == counts
    assert (summary["stage"], summary["status"], summary["output"]) == ("sample", "finished", "out.jsonl")
    again = json.loads(cai(*WORDS["sample"], "-o", "out.jsonl", "--json").stdout)
    assert {**again, "status": "finished"} == summary


def test_json_goes_to_stderr_where_rows_go_to_stdout(cai: Cai, inputs: Path) -> None:
    done = cai("sample", "prompts.jsonl", *ALL, "--limit", "3", "--json")
    assert len(done.stdout.splitlines()) == 3
    assert json.loads(done.stderr)["out"] == 3


def test_quiet_prints_nothing(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "out.jsonl", "--quiet")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_rows_on_stdout_are_the_rows_of_the_file_and_what_is_rejected_is_shown_whole(cai: Cai, inputs: Path) -> None:
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    piped = cai(*WORDS["sample"], "-o", "-", "--quiet")
    assert piped.stdout.encode() == (inputs / "out.jsonl").read_bytes()
    shown = [json.loads(line.split("rejected: ", 1)[1]) for line in piped.stderr.splitlines()]
    assert shown == rows_in(inputs / "out.jsonl.rejected.jsonl")


def test_what_is_rejected_can_be_asked_again(cai: Cai, inputs: Path) -> None:
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


def test_a_bad_row_stops_the_run_at_its_line_and_mending_it_starts_another(cai: Cai, inputs: Path) -> None:
    with (inputs / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": NaN}\n')
    words = (*WORDS["sample"], "-o", "out.jsonl", "--batch-size", "4")
    stopped = cai(*words)
    assert stopped.code == 1
    assert "error: prompts.jsonl:11: not JSON" in stopped.stderr
    assert not (inputs / "out.jsonl").exists()
    write_rows(inputs / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(10)))
    assert "input.prompts: " in cai(*words).stderr
    assert cai(*words, "--overwrite").code == 0


def test_a_process_substitution_is_read_once_and_whole(inputs: Path) -> None:
    line = f"{sys.executable} -m cai_cli sample <(cat prompts.jsonl) {' '.join(ALL)} -o out.jsonl --json"
    done = subprocess.run(["bash", "-c", line], cwd=inputs, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["in"] == 10


def test_text_that_steers_a_terminal_is_shown_harmless(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "prompts.jsonl", [{"prompt": "q", "\x1b[2J\u202e": 1}])
    shown = cai(*WORDS["sample"], "-o", "out.jsonl").stderr
    assert "unknown field" in shown
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


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_output_that_is_no_file_is_a_usage_error(output: str, cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["yes"]}])
    (tmp_path / "prompts.txt").write_text("why?\n")
    refused = cai("sample", "prompts.txt", "-o", output, "--model", "scripted:script.jsonl")
    assert (refused.code, refused.stdout) == (2, "")
    assert "-o FILE" in refused.stderr


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


def test_a_run_that_skips_every_row_is_done(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "alone.jsonl", [sample_row(1)])
    done = cai("label-prefs", "alone.jsonl", *ALL, "-o", "out.jsonl")
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
    assert (done.code, f"all {rejected} rows were rejected" in done.stderr) == (1, True), done.stderr
    assert manifest_of(inputs / "out.jsonl")["counts"]["rejected"] == rejected


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sample", "label-prefs"])
def test_dev_stdout_is_stdout_and_dev_null_takes_the_rows_without_sidecars(stage: str, cai: Cai, inputs: Path) -> None:
    piped = cai(*WORDS[stage], "-o", "-")
    assert piped.stdout.count("\n") > 1
    named = cai(*WORDS[stage], "-o", "/dev/stdout", "--json")
    assert (named.code, named.stdout) == (0, piped.stdout)
    lines = named.stderr.splitlines()
    assert json.loads(lines.pop() if stage == "sample" else next(x for x in lines if x.startswith("{")))["out"] > 1
    for _ in range(2):  # nothing is finished already
        null = cai(*WORDS[stage], "-o", "/dev/null", "--overwrite")
        assert (null.code, null.stdout) == (0, "")
        assert null.stderr.count("warning: rejected: ") == piped.stderr.count("warning: rejected: ") > 0
    assert Path("/dev/null").is_char_device()
    assert not [p for p in Path("/dev").iterdir() if p.name.startswith(("null.", "stdout."))]


def test_a_named_pipe_takes_the_rows(inputs: Path) -> None:
    line = f"{sys.executable} -m cai_cli sample prompts.jsonl {' '.join(ALL)} -o >(cat > rows.jsonl); wait $!"
    subprocess.run(["bash", "-c", line], cwd=inputs, capture_output=True, text=True, check=True, timeout=60)
    assert len(rows_in(inputs / "rows.jsonl")) == 9


def test_a_device_that_takes_no_bytes_is_an_error(cai: Cai, inputs: Path) -> None:
    done = cai(*WORDS["sample"], "-o", "/dev/full")
    assert (done.code, "error: cannot write /dev/full: No space left" in done.stderr) == (1, True)


@pytest.mark.parametrize("command", ["sort", "dedup"])
def test_sorted_rows_go_to_streams_too(command: str, cai: Cai, inputs: Path) -> None:
    assert cai(command, "prompts.jsonl", "-o", "out.jsonl").code == 0
    assert cai(command, "prompts.jsonl", "-o", "/dev/stdout").stdout.encode() == (inputs / "out.jsonl").read_bytes()
    assert cai(command, "prompts.jsonl", "-o", "/dev/null").code == 0


@pytest.mark.parametrize("limit", [None, 2, 50])
def test_the_total_of_the_progress_bar_is_at_most_the_file(limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("1\n2\n3")  # the last line lacks its newline
    file = hash_input(str(tmp_path / "rows.jsonl"))
    assert expected_items(file, limit, per_row=2) == 2 * min(3, limit or 3)
    assert expected_items(InputFile("-", None, None), limit) is None


def test_an_overwritten_output_is_kept_until_the_new_one_is_whole(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["yes"]}])
    words = ("-o", "out.jsonl", "--model", "scripted:script.jsonl", "--overwrite")
    (tmp_path / "prompts.txt").write_text("why?\n")
    assert cai("sample", "prompts.txt", *words).code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("out.jsonl*")}
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    assert cai("sample", "bad.jsonl", *words).code == 1
    assert cai("sample", "bad.jsonl", *words).code == 1
    assert (tmp_path / "out.jsonl.old").read_bytes() == before["out.jsonl"]
    assert (tmp_path / "out.jsonl.manifest.json.old").read_bytes() == before["out.jsonl.manifest.json"]
    assert cai("sample", "prompts.txt", *words).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before["out.jsonl"]
    assert {p.name for p in tmp_path.glob("out.jsonl*")} == set(before)
