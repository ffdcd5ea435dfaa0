"""SIGKILL while a checkpoint is written and while the finished model appears: the last whole checkpoint is gone on
from, and the parameters in the end are those of a run left alone."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ran
from forked import Forks, clear, files_of, needs_strace
from helpers import largest_difference, manifest_of, preference, revision, rows_in, sample_row, write_rows
from tiny import tiny_model_dir

from cai_cli.training.checkpoints import SEAL

CALLS = ("write", "writev", "openat", "mkdir", "rename", "fsync", "unlink")
RECIPE = ("--max-steps", "5", "--save-steps", "2", "--batch-size", "4", "--gradient-accumulation", "1",
          "--eval-share", "0", "--device", "cpu", "--model", "model", "-o", "out")  # fmt: skip
RUNS = {"sft": ("sft", "revisions.jsonl", *RECIPE), "train-pm": ("train-pm", "preferences.jsonl", *RECIPE),
        "dpo": ("dpo", "preferences.jsonl", *RECIPE)}  # fmt: skip


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks(
        "cai_cli.models.loading", "datasets", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.dpo_trainer",
        "transformers.models.llama.modeling_llama",
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_dir(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        os.utime(file, (0, 0))  # hashes of files that were just written are not cached, which would add calls to a run
    write_rows(tmp_path / "revisions.jsonl", [revision(i, f"answer {i * 7}") for i in range(8)])
    write_rows(tmp_path / "preferences.jsonl", [preference(i, chosen=f"helpful {i}") for i in range(8)])
    return tmp_path


def kills_of(log: Path, every: int) -> tuple[list[str], list[str]]:
    """One injection for every `every`th call that touches the checkpoint of step 4 before its seal makes it whole, and
    for every sync and rename after that or of the output."""
    seen: Counter[str] = Counter()
    saving, publishing = [], []
    whole = False
    for line in log.read_text(errors="replace").splitlines():
        if not (found := re.match(r"(\w+)\(", line)):
            continue
        seen[found[1]] += 1
        inject = f"{found[1]}:signal=SIGKILL:when={seen[found[1]]}"
        whole = whole or (found[1] == "rename" and f"checkpoint-4/{SEAL}" in line)
        if "checkpoint-4" in line and "O_RDONLY" not in line and not whole:
            saving.append(inject)
        elif found[1] in ("fsync", "rename") and "metrics" not in line:
            publishing.append(inject)
    assert len(saving) > 30
    return [*saving[::every], saving[-1]], publishing


@needs_strace
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "every", "at_end"), [("sft", 7, 1), ("train-pm", 20, 1), ("dpo", 40, 3)])
def test_a_kill_during_a_checkpoint_or_at_the_end_leads_to_the_same_parameters(
    stage: str, every: int, at_end: int, forks: Forks, folder: Path, ran: Ran
) -> None:
    out = folder / "out"
    assert forks.run(*RUNS[stage], cwd=folder).code == 0
    for name in ("out", "out.manifest.json"):
        (folder / name).rename(folder / name.replace("out", "calm"))
    forks.run_injected(*RUNS[stage], cwd=folder, inject=",".join(CALLS), log=folder / "log")
    saving, publishing = kills_of(folder / "log", every)
    publishing = publishing[::at_end]
    for inject in [*saving, *publishing]:
        clear(folder, "out*")
        killed = forks.run_injected(*RUNS[stage], cwd=folder, inject=inject)
        assert killed.code == -9, (inject, killed)
        again = forks.run(*RUNS[stage], cwd=folder)
        assert again.code == 0, (inject, again)
        if inject in saving:
            assert f"{stage}: resuming after step 2\n" in again.stderr, (inject, again)
        assert largest_difference(folder / "calm", out) == 0, inject
        assert rows_in(folder / "calm/metrics.jsonl") == rows_in(out / "metrics.jsonl")
        assert manifest_of(out)["counts"] == manifest_of(folder / "calm")["counts"]
        left = {path.name for path in folder.glob("out*")}
        assert left == {"out", "out.manifest.json"}, inject
    ran(f"{stage}: {len(saving)} kills while a checkpoint was written, {len(publishing)} at syncs and renames")


@needs_strace
@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_kill_while_rows_are_scored_changes_no_byte_in_the_end(forks: Forks, folder: Path, ran: Ran) -> None:
    done = forks.run(*RUNS["train-pm"][:-1], "pm", cwd=folder)
    assert done.code == 0, done
    write_rows(folder / "samples.jsonl", [sample_row(i) for i in range(12)])
    words = ("score", "samples.jsonl", "--pm", "pm", "-o", "out.jsonl", "--batch-size", "1", "--device", "cpu")
    assert forks.run(*words, cwd=folder).code == 0
    calm, kills = files_of(folder), 0
    for call in ("fsync", "write", "rename"):
        for nth in range(1, 50):
            clear(folder)
            killed = forks.run_injected(*words, cwd=folder, inject=f"{call}:signal=SIGKILL:when={nth}")
            if killed.code == 0:
                break
            kills += 1
            assert files_of(folder).get("out.jsonl") in (None, calm["out.jsonl"])
            again = forks.run(*words, cwd=folder)
            assert again.code == 0, (call, nth, again)
            assert files_of(folder) == calm, (call, nth)
    assert kills > 10
    ran(f"score: {kills} kills")
