"""A run that was killed, torn or disturbed ends in the same bytes as one that was not. Faults are real: SIGKILL to a
real process, bytes cut from real files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CAI = [sys.executable, "-m", "cai_cli"]
STAGES = ("sample", "critique-revise", "label-prefs")


def cai(*words: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CAI, *words], cwd=cwd, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def write_inputs(folder: Path, seconds: float) -> None:
    """40 prompts, a script whose answers take `seconds` each, one prompt that always fails, samples to continue with."""
    prompts = [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(40)]
    write(folder / "prompts.jsonl", prompts)
    script = [
        {"contains": "question 7", "replies": ["   "], "seconds": seconds},
        {"contains": "question 9", "replies": [""], "scores": None, "seconds": seconds},
        # A judge that prefers reply 0 in either position; one with position bias gives ties only.
        {"contains": "(A) [[[reply 0", "scores": [-0.2, -1.7], "seconds": seconds},
        {"replies": [f"answer number {i}." for i in range(7)], "scores": [-1.7, -0.2], "seconds": seconds},
    ]
    write(folder / "script.jsonl", script)
    samples = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"question {i}"}], "kind": None, "source": None,
         "sample_index": k, "completion": [{"role": "assistant", "content": f"reply {k} to {i}"}],
         "finish_reason": "stop"}
        for i in range(40) for k in range(2)
    ]  # fmt: skip
    write(folder / "samples.jsonl", samples)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(stage: str) -> list[str]:
    source = "prompts.jsonl" if stage == "sample" else "samples.jsonl"
    words = [stage, source, "-o", "out.jsonl", "--model", "scripted:script.jsonl", "--batch-size", "4"]
    return [*words, "--rounds", "2"] if stage == "critique-revise" else words


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_in_the_middle_and_the_same_command_again_ends_in_the_same_bytes(stage: str, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder, seconds in ((calm, 0.0), (killed, 0.01)):
        folder.mkdir()
        write_inputs(folder, seconds)
    assert cai(*command(stage), cwd=calm).returncode == 0

    # The slow script is another model; resuming must meet the same one, so both killed runs use it.
    child = subprocess.Popen([*CAI, *command(stage)], cwd=killed, stderr=subprocess.DEVNULL)
    partial = killed / "out.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert child.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = partial.read_bytes()
    assert before, "killed before anything was written"
    assert not (killed / "out.jsonl").exists(), "killed too late"

    done = cai(*command(stage), cwd=killed)
    assert done.returncode == 0, done.stderr
    assert "rows are finished" in done.stderr
    assert (killed / "out.jsonl").read_bytes() == (calm / "out.jsonl").read_bytes()
    assert (killed / "out.jsonl").read_bytes().startswith(before)
    rejected = "out.jsonl.rejected.jsonl"
    assert (killed / rejected).read_bytes() == (calm / rejected).read_bytes()
    counts = [json.loads((f / "out.jsonl.manifest.json").read_text())["counts"] for f in (calm, killed)]
    assert counts[0] == counts[1]
    assert counts[0]["in"] == counts[0]["out"] + counts[0]["rejected"] + counts[0]["skipped"]
    assert not list(killed.glob("*.partial*"))


def test_a_torn_tail_at_any_byte_of_the_last_two_rows_is_cut_and_generated_again(tmp_path: Path) -> None:
    from cai_cli.common.errors import CaiError
    from cai_cli.data.schema import Prompt
    from cai_cli.runtime.manifest import InputFile, provenance
    from cai_cli.runtime.stage_run import StageRun, WorkItem, WorkItems

    rows = [
        Prompt.model_validate({"id": f"p{i}", "prompt": [{"role": "user", "content": f"é{i}\u2028"}]}) for i in range(6)
    ]

    def units() -> WorkItems[Prompt]:
        return (WorkItem(row.id, i, row) for i, row in enumerate(rows, 1))

    asked: list[str] = []

    def work(given):  # type: ignore[no-untyped-def]
        if fail_after is not None and len(asked) >= fail_after:
            raise CaiError("stop")
        asked.extend(row.id for row in given)
        return given

    inputs = {"rows": InputFile("rows", None, None)}
    made = provenance("test", inputs=inputs, settings={})
    out = tmp_path / "out.jsonl"
    job = StageRun(made, inputs, str(out), False, units, work, batch_size=1)
    fail_after: int | None = 5
    with pytest.raises(CaiError, match="stop"):
        job.run(as_json=False)
    partial = out.with_name("out.jsonl.partial")
    whole, draft = partial.read_bytes(), out.with_name("out.jsonl.partial.manifest.json").read_bytes()
    fail_after = None
    expected = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
    start = whole[: whole.rindex(b"\n", 0, -1)].rindex(b"\n") + 1
    for cut in range(start, len(whole) + 1):
        for file in tmp_path.iterdir():
            file.unlink()
        partial.write_bytes(whole[:cut])
        out.with_name("out.jsonl.partial.manifest.json").write_bytes(draft)
        asked.clear()
        job.run(as_json=False)
        assert out.read_bytes() == expected
        kept = whole[:cut].count(b"\n")
        assert asked == [row.id for row in rows[kept:]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "settings.seed: 0 -> 1"),
        (["--temperature", "0.5"], "settings.temperature"),
        (["--model", "scripted:other.jsonl"], "model.fingerprint"),
        (["--limit", "3"], "settings.limit"),
    ],
)
def test_a_partial_of_another_run_is_refused_naming_the_difference(
    change: list[str], named: str, tmp_path: Path
) -> None:
    write_inputs(tmp_path, 0.02)
    write(tmp_path / "other.jsonl", [{"replies": ["else"]}])
    child = subprocess.Popen([*CAI, *command("sample")], cwd=tmp_path, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.005)
    child.kill()
    child.wait()
    before = partial.read_bytes()
    refused = cai(*command("sample"), *change, cwd=tmp_path)
    assert refused.returncode == 1
    assert named in refused.stderr
    assert "hint: --overwrite" in refused.stderr
    assert partial.read_bytes() == before
    assert cai(*command("sample"), *change, "--overwrite", cwd=tmp_path).returncode == 0


def test_a_changed_input_is_refused_and_a_finished_output_left_alone(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    assert cai(*command("sample"), cwd=tmp_path).returncode == 0
    first = (tmp_path / "out.jsonl").stat()
    again = cai(*command("sample"), "--json", cwd=tmp_path)
    assert again.returncode == 0
    assert json.loads(again.stdout)["status"] == "already finished"
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    prompts = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(prompts.replace("question", "query", 1))
    assert (tmp_path / "prompts.jsonl").read_text() != prompts
    refused = cai(*command("sample"), cwd=tmp_path)
    assert refused.returncode == 1
    assert "rows of the input are not those that the output was made from" in refused.stderr
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == first.st_mtime_ns


def test_a_second_writer_is_refused_at_once_and_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0.12)
    child = subprocess.Popen([*CAI, *command("sample")], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.jsonl.partial.manifest.json").exists():
        time.sleep(0.005)
    second = cai(*command("sample"), cwd=tmp_path)
    child.kill()
    child.wait()
    assert second.returncode == 1
    assert "another cai is writing" in second.stderr
    assert cai(*command("sample"), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_code_a_clean_tail_and_no_traceback(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    write_inputs(tmp_path, 0.02)
    # A shell that starts the tests in the background leaves SIGINT ignored, and children inherit that.
    child = subprocess.Popen(
        [*CAI, *command("sample")],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    partial = tmp_path / "out.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.005)
    child.send_signal(sent)
    _, stderr = child.communicate(timeout=10)
    assert child.returncode == code
    assert "Traceback" not in stderr
    assert partial.read_bytes().endswith(b"\n")


def test_stages_pipe_into_each_other_and_a_reader_that_leaves_makes_no_noise(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    model = "--model scripted:script.jsonl"
    py = f"{sys.executable} -m cai_cli"
    line = (
        f"{py} sample prompts.jsonl {model} --limit 7 -n 2 | {py} critique-revise - {model} --rounds 1"
        f" | {py} label-prefs - {model} --one-order -o prefs.jsonl"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "prefs.jsonl.manifest.json").read_text())["counts"]
    assert counts["in"] == 7
    assert counts["out"] + counts["skipped"] == 7
    head = f"{py} sample prompts.jsonl {model} -n 500 | head -1"
    left = subprocess.run(["bash", "-c", head], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert json.loads(left.stdout)["id"] == "p0"
    assert "Traceback" not in left.stderr
    assert "Error" not in left.stderr


def test_output_that_is_the_input_is_refused_even_behind_a_link(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "prompts.jsonl")
    before = (tmp_path / "prompts.jsonl").read_bytes()
    for extra in ([], ["--overwrite"]):
        refused = cai(*command("sample"), *extra, cwd=tmp_path)
        assert refused.returncode == 1
        assert "both input and output" in refused.stderr
    assert (tmp_path / "prompts.jsonl").read_bytes() == before


def test_given_ids_twice_are_an_error_naming_both_lines_equal_prompts_without_id_are_skipped(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    words = ["-o", "o.jsonl", "--model", "scripted:script.jsonl"]
    write(tmp_path / "twice.jsonl", [{"id": "1", "prompt": "a"}, {"prompt": "b"}, {"id": 1, "prompt": "c"}])
    refused = cai("sample", "twice.jsonl", *words, cwd=tmp_path)
    assert refused.returncode == 1
    assert "twice.jsonl:3" in refused.stderr
    assert "line 1" in refused.stderr
    (tmp_path / "equal.txt").write_text("hello\nthere\nhello\n")
    done = cai("sample", "equal.txt", *words, "--json", "--overwrite", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert (summary["in"], summary["out"], summary["skipped"]) == (3, 2, 1)


def test_a_directory_that_cannot_be_written_is_one_line_of_error(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    (tmp_path / "file").write_text("not a directory")
    words = ["sample", "prompts.jsonl", "--model", "scripted:script.jsonl", "-o", "file/out.jsonl"]
    refused = cai(*words, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


def test_a_full_disk_is_one_line_of_error(tmp_path: Path) -> None:
    write_inputs(tmp_path, 0)
    full = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m cai_cli sample prompts.jsonl --model scripted:script.jsonl > /dev/full"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 1
    assert "No space left" in full.stderr
    assert "Traceback" not in full.stderr
