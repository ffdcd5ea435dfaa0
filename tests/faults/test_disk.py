"""A disk that fills up, breaks or may not be written, an output that is the input, and two writers: one line of error
each, what was there before stays whole, and the same command resumes when the cause is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ran
from forked import NOBODY, Ended, Forks, clear, files_of, needs_strace, until
from helpers import Json, sample_row, write_rows

CAI = [sys.executable, "-m", "cai_cli"]
SCRIPT = ("--model", "scripted:script.jsonl", "--batch-size", "2")
SAMPLE = ("sample", "prompts.jsonl", *SCRIPT, "-n", "2", "-o", "out.jsonl")
STAGES = {
    "sample": SAMPLE,
    "critique-revise": ("critique-revise", "samples.jsonl", *SCRIPT, "--rounds", "1", "-o", "out.jsonl"),
    "label-prefs": ("label-prefs", "samples.jsonl", *SCRIPT, "--one-order", "-o", "out.jsonl"),
    "sort": ("sort", "samples.jsonl", "-o", "out.jsonl"),
    "compressed": (*SAMPLE[:-1], "out.jsonl.zst"),
}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks("zstandard", "pyarrow")
    yield made
    made.close()


def write_inputs(folder: Path) -> Path:
    write_rows(folder / "prompts.jsonl", ({"id": f"p{i}", "prompt": f"question {i}"} for i in range(6)))
    write_rows(folder / "samples.jsonl", (sample_row(i, k) for i in range(6) for k in range(2)))
    rows: list[Json] = [
        {"contains": "question 3", "replies": [""], "scores": [-1.0, -1.0]},
        {"replies": ["one.", "two.", "three."], "scores": [-0.1, -3.0]},
    ]
    write_rows(folder / "script.jsonl", rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_inputs(tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may pass through, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="cai-faults-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield write_inputs(Path(name))


# --- a full disk --------------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.faults
@pytest.mark.parametrize(
    "error", ["write:error=ENOSPC", "fsync:error=EIO", "rename:error=ENOSPC", "openat:error=EROFS"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_system_call_is_one_line_of_error_and_the_same_command_resumes(
    stage: str, error: str, forks: Forks, folder: Path, ran: Ran
) -> None:
    assert forks.run(*STAGES[stage], cwd=folder).code == 0
    calm, failures = files_of(folder), 0
    log = folder / "log"
    for nth in range(1, 100):
        clear(folder)
        failed = forks.run_injected(*STAGES[stage], cwd=folder, inject=f"{error}:when={nth}", log=log)
        if "(INJECTED)" not in log.read_text():
            break
        failures += 1
        call = log.read_text().split("(INJECTED)")[0].splitlines()[-1]
        if "O_RDONLY" in call or call.startswith("write(2<"):
            continue  # no disk refuses to be read as read-only, and stderr is on none
        if failed.code == 0:  # the last file that was opened or removed mattered to nobody
            assert files_of(folder) == calm
            continue
        failed.assert_is_one_error()
        again = forks.run(*STAGES[stage], cwd=folder)
        assert again.code == 0, (nth, again)
        assert files_of(folder) == calm, nth
    assert failures >= 3
    ran(f"{stage}: {failures} of {error}")


@needs_strace
def test_a_disk_that_fills_up_in_the_middle_is_one_line_and_nothing_is_lost(forks: Forks, folder: Path) -> None:
    assert forks.run(*SAMPLE, cwd=folder).code == 0
    calm = files_of(folder)
    for nth in (1, 2, 4):
        clear(folder)
        failed = forks.run_injected(*SAMPLE, cwd=folder, inject=f"write:error=ENOSPC:when={nth}")
        failed.assert_is_one_error()
        assert "No space left on device" in failed.stderr
        assert forks.run(*SAMPLE, cwd=folder).code == 0
        assert files_of(folder) == calm


@pytest.mark.faults
def test_a_small_file_system_that_fills_up_stops_the_run_resumably(forks: Forks, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("NOT ALLOWED TO MOUNT: no small file system can be filled")
    try:
        write_inputs(disk)
        assert forks.run(*SAMPLE, cwd=disk).code == 0
        calm, stopped = files_of(disk), 0
        for room in range(0, 40, 4):
            clear(disk)
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            filler.write_bytes(b"x" * max(0, free - 1024 * room))
            failed = forks.run(*SAMPLE, cwd=disk)
            filler.unlink()
            if failed.code:
                stopped += 1
                # stderr is on the same disk: it may be cut, but holds no traceback.
                assert failed.code == 1
                assert "Traceback" not in failed.stderr
                assert not (disk / "out.jsonl").exists()
                assert forks.run(*SAMPLE, cwd=disk).code == 0
            assert files_of(disk) == calm
        assert stopped >= 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.faults
def test_a_limit_on_the_size_of_files_stops_the_run_resumably_wherever_it_bites(forks: Forks, folder: Path) -> None:
    assert forks.run(*SAMPLE, cwd=folder).code == 0
    calm, stopped = files_of(folder), 0
    largest = max(path.stat().st_size for path in folder.glob("out.jsonl*"))
    for most in range(256, largest + 64, 64):
        clear(folder)
        failed = forks.run(*SAMPLE, cwd=folder, file_bytes=most)
        if failed.code:
            stopped += 1
            failed.assert_is_one_error()
            assert "File too large" in failed.stderr
            assert forks.run(*SAMPLE, cwd=folder).code == 0
        assert files_of(folder) == calm, most
    assert stopped > 10


@needs_strace
@pytest.mark.faults
def test_an_output_that_is_replaced_stays_whole_when_the_disk_fills_up(forks: Forks, folder: Path) -> None:
    for nth in range(1, 20):
        clear(folder)
        assert forks.run(*SAMPLE, cwd=folder).code == 0
        old = (folder / "out.jsonl").read_bytes()
        other = (*SAMPLE, "--seed", "1", "--overwrite")
        failed = forks.run_injected(*other, cwd=folder, inject=f"write:error=ENOSPC:when={nth}")
        if failed.code == 0:
            break
        failed.assert_is_one_error()
        if (folder / "out.jsonl.manifest.json").exists():  # it was the summary line that did not fit
            continue
        assert old in [path.read_bytes() for path in folder.glob("out.jsonl*")]
    assert nth > 5


# --- what may not be written, or read -----------------------------------------------------------------------------


def as_nobody(forks: Forks, folder: Path, *words: str) -> Ended:
    """The run as a user without any right here but to read."""
    (folder / ".stderr").touch()
    (folder / ".stderr").chmod(0o666)
    return forks.run(*words, cwd=folder, uid=NOBODY)


@pytest.mark.parametrize(
    "output",
    ["out.jsonl", "new/out.jsonl", "/proc/out.jsonl", "/dev/null/out.jsonl", "/sys/out.jsonl", "prompts.jsonl/o"],
)
def test_a_place_that_may_not_be_written_is_one_line_that_names_it(
    output: str, forks: Forks, open_folder: Path
) -> None:
    for stage in ("sample", "sort"):
        words = (*STAGES[stage][:-1], output)
        refused = as_nobody(forks, open_folder, *words)
        refused.assert_is_one_error()
        assert "another cai" not in refused.stderr
        assert re.match(
            rf"error: cannot write {output}: (Permission denied|No such file|Not a directory|File exists|Read-only)",
            refused.stderr,
        )


def test_a_finished_output_that_may_not_be_replaced_stays_as_it_is(forks: Forks, open_folder: Path) -> None:
    assert forks.run(*SAMPLE, cwd=open_folder).code == 0
    before = files_of(open_folder)
    for more in ((), ("--seed", "1", "--overwrite")):
        as_nobody(forks, open_folder, *SAMPLE, *more).assert_is_one_error()
        assert files_of(open_folder) == before


@pytest.mark.parametrize("name", ["prompts.jsonl", "script.jsonl"])
def test_what_may_not_be_read_is_one_line_that_names_it(name: str, forks: Forks, open_folder: Path) -> None:
    open_folder.chmod(0o777)
    (open_folder / name).chmod(0)
    refused = as_nobody(forks, open_folder, *SAMPLE)
    refused.assert_is_one_error()
    assert name in refused.stderr
    assert "Permission denied" in refused.stderr


@pytest.mark.faults
def test_a_file_system_mounted_read_only_is_one_line_and_loses_nothing(forks: Forks, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("NOT ALLOWED TO MOUNT: no file system can be made read-only")
    try:
        write_inputs(disk)
        assert forks.run(*SAMPLE, cwd=disk).code == 0
        before = files_of(disk)
        (disk / "out.jsonl").rename(disk / "out.jsonl.partial")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words in (SAMPLE, (*SAMPLE, "--overwrite"), STAGES["sort"]):
            refused = subprocess.run([*CAI, *words], cwd=disk, capture_output=True, text=True, check=False)
            Ended(refused.returncode, refused.stderr).assert_is_one_error()
            assert "Read-only file system" in refused.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        (disk / "out.jsonl.partial").rename(disk / "out.jsonl")
        assert files_of(disk) == before
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- output = input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["its name", "another spelling", "a symbolic link", "a hard link", "a linked folder"])
@pytest.mark.parametrize(
    "stage",
    [
        "sample",
        *(pytest.param(s, marks=pytest.mark.faults) for s in ("critique-revise", "label-prefs", "sort", "dedup")),
    ],
)
def test_an_output_that_is_the_input_is_refused_under_any_name(
    stage: str, way: str, forks: Forks, folder: Path
) -> None:
    source = "prompts.jsonl" if stage == "sample" else "samples.jsonl"
    (folder / "side").symlink_to(folder)
    if way == "a symbolic link":
        (folder / "link.jsonl").symlink_to(folder / source)
    if way == "a hard link":
        os.link(folder / source, folder / "link.jsonl")
    output = {
        "its name": source,
        "another spelling": f"./side/../{folder.name}/{source}",
        "a linked folder": f"side/{source}",
    }
    words = ("dedup", source) if stage == "dedup" else STAGES[stage][:-2]
    before = (folder / source).read_bytes()
    for more in ((), ("--overwrite",)):
        refused = forks.run(*words, "-o", output.get(way, "link.jsonl"), *more, cwd=folder)
        refused.assert_is_one_error()
        assert "is both input and output" in refused.stderr
    assert (folder / source).read_bytes() == before
    assert not list(folder.glob("*.old")) + list(folder.glob("*.partial*"))


# --- two writers --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_killed_holder_frees_the_lock(forks: Forks, folder: Path) -> None:
    write_rows(folder / "script.jsonl", [{"replies": ["one."], "seconds": 0.3}])
    holder = subprocess.Popen([*CAI, *SAMPLE], cwd=folder, stderr=subprocess.DEVNULL)
    until((folder / "out.jsonl.partial.manifest.json").exists)
    before = (folder / "out.jsonl.partial.manifest.json").read_bytes()
    for more in ((), ("--overwrite",), ("--seed", "3")):
        refused = forks.run(*SAMPLE, *more, cwd=folder)
        refused.assert_is_one_error()
        assert "another cai is writing" in refused.stderr
    assert holder.poll() is None  # nobody waited for it
    assert (folder / "out.jsonl.partial.manifest.json").read_bytes() == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = forks.run(*SAMPLE, cwd=folder)
    assert done.code == 0, done
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 12


@pytest.mark.faults
def test_of_many_writers_at_once_one_writes_and_all_others_are_refused(folder: Path) -> None:
    write_rows(folder / "script.jsonl", [{"replies": ["one."], "seconds": 0.1}])
    many = [subprocess.Popen([*CAI, *SAMPLE], cwd=folder, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [child.communicate(timeout=120)[1] for child in many]
    # One that came when the first had ended finds its work done.
    assert {child.returncode for child in many} <= {0, 1}
    assert [child.returncode for child in many].count(0) >= 1
    assert all("another cai is writing" in text for child, text in zip(many, said, strict=True) if child.returncode)
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [(row["id"], row["sample_index"]) for row in rows] == [(f"p{i}", k) for i in range(6) for k in range(2)]
