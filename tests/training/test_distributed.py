"""Training in several processes: two on gloo give what one gives, and no failure leaves anything waiting."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cai
from helpers import largest_difference, manifest_of, preference, revision, rows_in, stage, write_rows
from tiny import tiny_model_dir

from cai_cli.training import distributed

train_pm_stage = stage("train-pm")

SECONDS = 240
# Every metric of a step that does not depend on how replies and tokens are averaged over micro-batches.
SAME = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "reward", "reward_std", "kl", "cut_off_share",
        "held_out_loss", "held_out_accuracy", "held_out_margin", "pm_score", "implicit_reward", "held_out_kl", "reply_tokens")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a preference model, and rows for each stage in numbers that the effective batch of 8 divides."""
    made = tmp_path_factory.mktemp("ranks")
    tiny_model_dir(made / "tiny")
    tiny_model_dir(made / "judge", seed=5, max_position_embeddings=1024)
    write_rows(made / "rev.jsonl", [revision(i, f"answer {i * 7}" + " more" * (i % 5)) for i in range(36)])
    pairs = [preference(i, 0.6 + i / 100, f"helpful {i}" + " x" * (i % 7), f"toxic {i}") for i in range(36)]
    write_rows(made / "prefs.jsonl", pairs)
    (made / "prompts.txt").write_text("".join(f"question number {i}\n" for i in range(12)))
    train_pm_stage(str(made / "prefs.jsonl"), made / "pm", model=str(made / "tiny"), learning_rate=1e-3, quiet=True)
    return made


def words(stage: str, output: Path, accumulation: int, *more: str) -> list[str]:
    """A command line of which one process with `accumulation` 2 and two with 1 take the same steps."""
    shared = ["-o", str(output), "--model", "tiny", "--learning-rate", "1e-3", "--save-steps", "2"]
    if stage in ("rl", "rl --judge"):
        reward = ["--pm", "pm"] if stage == "rl" else ["--judge", "judge", "--max-principles", "1"]
        replies = ["--prompts-per-step", "2", "--samples-per-prompt", "4", "--max-new-tokens", "8"]
        return ["rl", "prompts.txt", *shared, *reward, "--steps", "5", "--monitor-every", "2", *replies, *more]
    source = {"sft": "rev.jsonl"}.get(stage, "prefs.jsonl")
    rows = ["--batch-size", "4", "--gradient-accumulation", str(accumulation), "--eval-share", "0.112", "--epochs", "2"]
    of_stage = {"train-pm": ["--fit-head"], "dpo": ["--max-new-tokens", "8", "--monitor-every", "4"]}
    return [stage, source, *shared, *rows, *of_stage.get(stage, []), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def torchrun(folder: Path, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, "-m", "cai_cli", *arguments]


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )


def assert_same_curves(one: Path, other: Path) -> None:
    """To 1e-4, absolute and relative: sums in another order, for ten steps of a large learning rate."""
    a, b = rows_in(one / "metrics.jsonl"), rows_in(other / "metrics.jsonl")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, twin in zip(a, b, strict=True):
        known = {name: row[name] for name in SAME if row.get(name) is not None}
        assert known == pytest.approx({name: twin[name] for name in known}, rel=1e-4, abs=1e-4), row["step"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "train-pm", "rl", "rl --judge", "dpo"])
def test_two_processes_take_the_steps_of_one_at_the_same_effective_batch(
    stage: str, folder: Path, tmp_path: Path
) -> None:
    alone = run(folder, [sys.executable, "-m", "cai_cli", *words(stage, tmp_path / "one", 2)])
    assert alone.returncode == 0, alone.stderr
    done = run(folder, torchrun(folder, *words(stage, tmp_path / "two", 1, "--num-processes", "2", "--json")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"status":"finished"') == 1  # only rank 0 prints
    assert_same_curves(tmp_path / "one", tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4
    for name, processes in (("one", 1), ("two", 2)):
        dealt = manifest_of(tmp_path / name)["run"]["training"]
        assert (dealt["processes"], dealt["effective_batch"], dealt["repeated_rows"]) == (processes, 8, 0)
        assert dealt["tokens_per_second"] > 0
    if stage == "rl --judge":  # rank 0 asks about the replies of both
        asked = [rows_in(tmp_path / name / "judge.jsonl") for name in ("one", "two")]
        assert [row["replies"] for row in asked[0]] == [row["replies"] for row in asked[1]]
    if stage not in {"sft", "train-pm"}:
        replies = [[row["completion"] for row in rows_in(tmp_path / name / "samples.jsonl")] for name in ("one", "two")]
        assert replies[0] == replies[1]


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of what torchrun has started."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        number = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes())
        if number:
            found[int(number[1])] = int(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_with_an_error_and_one_process_resumes_it(
    victim: int, folder: Path, tmp_path: Path
) -> None:
    more = ("--max-steps", "80")
    out = tmp_path / "killed"
    with subprocess.Popen(
        torchrun(folder, *words("sft", out, 1, *more)), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed.partial/checkpoint-4/files.sha256").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(ranks_of(job)[victim], signal.SIGKILL)
        _, messages = job.communicate(timeout=90)
    assert job.returncode != 0
    assert len(re.findall("^error: ", messages, re.MULTILINE)) == 1, messages
    assert "another process" in messages
    assert "run the same command again to resume" in messages
    assert not out.exists()
    # Two processes at accumulation 1 are one at 2; another effective batch is another run.
    refused = run(folder, [sys.executable, "-m", "cai_cli", *words("sft", out, 1, *more)])
    assert "settings.effective_batch: 8 -> 4" in refused.stderr
    alone = run(folder, [sys.executable, "-m", "cai_cli", *words("sft", out, 2, *more)])
    assert alone.returncode == 0, alone.stderr
    assert re.search(r"resuming after step \d+", alone.stderr)
    whole = run(folder, [sys.executable, "-m", "cai_cli", *words("sft", tmp_path / "whole", 2, *more)])
    assert whole.returncode == 0, whole.stderr
    assert_same_curves(tmp_path / "whole", out)


@pytest.mark.slow
def test_an_error_is_reported_once_for_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "mine").mkdir()  # noticed by rank 0 alone
    cases = {
        tuple(words("sft", tmp_path / "mine", 1)): "has no manifest, so it was not made by cai",
        ("sft", "bad.jsonl", "-o", str(tmp_path / "a"), "--model", "tiny"): "bad.jsonl:1: no prompt in this row",
        ("sample", "prompts.txt", "--model", "tiny"): "cai sample runs in one process, not in 2",
        ("sft", "-", "-o", str(tmp_path / "b"), "--model", "tiny"): "stdin reaches one process only",
        tuple(
            words("sft", tmp_path / "c", 1, "--num-processes", "3")
        ): "--num-processes is 3, but the number of running processes is 2",
    }
    for command, error in cases.items():
        done = run(folder, torchrun(folder, *command))
        assert done.returncode != 0
        assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1, done.stderr
        assert error in done.stderr


@pytest.mark.slow
def test_a_config_of_accelerate_starts_its_number_of_processes(folder: Path, tmp_path: Path) -> None:
    config = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
    (tmp_path / "two.yaml").write_text(f"{config}main_process_port: 0\nmixed_precision: bf16\nuse_cpu: false\n")
    more = ("--accelerate-config", str(tmp_path / "two.yaml"), "--device", "cpu")
    done = run(folder, [sys.executable, "-m", "cai_cli", *words("sft", tmp_path / "two", 1, *more)])
    assert done.returncode == 0, done.stderr
    assert manifest_of(tmp_path / "two")["run"]["training"]["processes"] == 2
    # With use_cpu accelerate starts one process and says nothing.
    (tmp_path / "cpu.yaml").write_text(
        f"{config.replace('MULTI_GPU', 'MULTI_CPU')}mixed_precision: 'no'\nuse_cpu: true\n"
    )
    more = ("--accelerate-config", str(tmp_path / "cpu.yaml"))
    done = run(folder, [sys.executable, "-m", "cai_cli", *words("sft", tmp_path / "cpu", 1, *more)])
    assert "--num-processes is 2, but the number of running processes is 1" in done.stderr


def test_missing_processes_are_reported(cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)  # as `accelerate launch --cpu --num_processes 2` leaves them
    done = cai("sft", str(folder / "rev.jsonl"), "-o", "out", "--model", str(folder / "tiny"))
    assert (done.code, done.error) == (1, "process-count")


def test_another_number_of_processes_than_num_processes_is_refused(cai: Cai, folder: Path) -> None:
    done = cai("sft", str(folder / "rev.jsonl"), "-o", "out", "--model", "tiny", "--num-processes", "2")
    assert (done.code, done.error) == (1, "process-count")


def test_a_head_is_not_fitted_to_sharded_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cai: Cai
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.chdir(folder)
    done = cai(*words("train-pm", tmp_path / "out", 1))
    assert (done.code, done.error) == (2, "sharded-weights"), done.stderr


def test_a_single_process_is_the_leader() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_rank_zero()) == (0, 1, True)
    assert distributed.from_rank_zero(lambda: 7) == 7
    assert distributed.gathered([1, 2]) == [1, 2]
