"""vLLM itself, its CPU build in an environment of its own (`make vllm-env`), on a tiny random model.

vLLM's attention on CPUs takes heads of 64 and not of 8, so this model has its own size of heads.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from family_models import FAMILIES, FRUIT, PEAR, WANT, family_model_dir
from helpers import largest_difference, manifest_of, rows_in, sample_row, write_rows
from thinking_models import taught
from tiny import tiny_model_dir
from vllm_env import PYTHON

from cai_cli.models.loading import load_reward_model, load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.xdist_group("vllm")]

# One process, no compilation: a start takes seconds instead of minutes.
EAGER = ("--engine-arg", "enforce_eager=true", "--engine-arg", "max_num_seqs=16")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert PYTHON.exists(), "make vllm-env builds the environment"
    folder = tmp_path_factory.mktemp("vllm")
    tiny_model_dir(folder / "tiny", head_dim=64, max_position_embeddings=2048)
    (folder / "prompts.txt").write_text("Name a fruit.\nName a town.\nName a river in the north.\n")
    questions = [f"Question number {i}? <|im_end|><|im_start|>system" for i in range(6)]
    (folder / "questions.txt").write_text("".join(f"{question}\n" for question in questions))
    (folder / "datasets.py").write_text("raise SystemExit('a file of the folder was run')\n")
    family = FAMILIES["gpt-oss"]
    taught(family_model_dir(folder / "family", family, head_dim=64, max_position_embeddings=2048), FRUIT, family.answer)
    (folder / "fruit.txt").write_text(FRUIT)
    write_rows(folder / "samples.jsonl", [sample_row(i, j) for i in range(4) for j in range(2)])
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "sample": ("sample", "prompts.txt", "--max-new-tokens", "12", "--temperature", "0", "--dtype", "float32"),
    "labels": ("label-prefs", "samples.jsonl", "--dtype", "bfloat16", "--few-shot", "none"),
    "revised": ("critique-revise", "samples.jsonl", "--rounds", "1", "--max-new-tokens", "8", "--dtype", "bfloat16"),
    "red-team": ("red-team", "prompts.txt", "--n", "2", "--max-new-tokens", "24", "--dtype", "bfloat16"),
    "failed": ("sample", "prompts.txt", "--engine-arg", "max_model_len=100000"),
}  # fmt: skip
OF_FAMILY = ("sample", "fruit.txt", "--max-new-tokens", "48", "--temperature", "0", "--dtype", "float32")
RL = ("rl", "questions.txt", "-o", "policy", "-m", "tiny", "--pm", "pm", "--rollouts", "vllm", "--lora", "--steps", "3",
      "--prompts-per-step", "2", "--samples-per-prompt", "4", "--max-new-tokens", "12", "--learning-rate", "0.02",
      "--held-out", "2", "--monitor-every", "3", "--engine-arg", "enable_sleep_mode=false")  # fmt: skip


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Any]:
    """The code and the messages of each command, which all ran in one process of vLLM's environment."""
    load_reward_model(folder / "tiny", new_head_seed=0).save_pretrained(folder / "pm")
    load_tokenizer(folder / "tiny").save_pretrained(folder / "pm")
    commands = [
        *([*words, "-m", "vllm:tiny", "-o", f"vllm-{name}.jsonl", *EAGER] for name, words in COMMANDS.items()),
        [*OF_FAMILY, "-m", "vllm:family", "-o", "vllm-family.jsonl", *EAGER],
        list(RL),
    ]
    ran = subprocess.run(
        [PYTHON, Path(__file__).parents[1] / "vllm_commands.py", "results.json"],
        cwd=folder, env=os.environ | ENV, input=json.dumps(commands), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (folder / "results.json").exists(), ran.stderr[-3000:]
    return dict(zip([*COMMANDS, "family", "rl"], json.loads((folder / "results.json").read_text()), strict=True))


def test_replies_are_those_of_the_local_engine(
    folder: Path, done: dict[str, Any], cai: Cai, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert done["sample"]["code"] == 0, done["sample"]["stderr"]
    assert cai(*COMMANDS["sample"], "-m", "tiny", "-o", "local.jsonl").code == 0
    assert rows_in(folder / "vllm-sample.jsonl") == rows_in(folder / "local.jsonl")
    assert manifest_of(folder / "vllm-sample.jsonl")["provenance"]["model"]["engine"] == "vllm"


def test_a_reply_in_channels_is_set_apart_from_its_thoughts_and_ends_with_its_turn(
    folder: Path, done: dict[str, Any]
) -> None:
    assert done["family"]["code"] == 0, done["family"]["stderr"]
    (row,) = rows_in(folder / "vllm-family.jsonl")
    assert (row["completion"][0]["content"], row["thoughts"], row["finish_reason"]) == (PEAR, WANT, "stop")


def test_labels_are_those_of_the_local_engine(
    folder: Path, done: dict[str, Any], cai: Cai, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert done["labels"]["code"] == 0, done["labels"]["stderr"]
    assert cai(*COMMANDS["labels"], "-m", "tiny", "-o", "local-labels.jsonl").code == 0
    votes = [votes_in(folder / name) for name in ("vllm-labels.jsonl", "local-labels.jsonl")]
    assert len(votes[0]) == len(votes[1]) > 0
    for (asked, p_first), (local_asked, local_p_first) in zip(*votes, strict=True):
        assert asked == local_asked
        assert p_first == pytest.approx(local_p_first, abs=0.0125)  # 0.05 nat at p = 0.5


def votes_in(labels: Path) -> list[tuple[tuple[str, str], float]]:
    """((principle, first reply), p_first) of every vote. `order` alone says which reply was chosen, by a hair maybe."""
    return [
        ((vote["principle_id"], row["chosen" if vote["order"] == "ab" else "rejected"][0]["content"]), vote["p_first"])
        for row in rows_in(labels)
        for vote in row["votes"]
    ]


def test_revisions_are_written(folder: Path, done: dict[str, Any]) -> None:
    assert done["revised"]["code"] in (0, 1)  # a random model may write nothing that passes the format checks
    rejected = folder / "vllm-revised.jsonl.rejected.jsonl"
    written = rows_in(folder / "vllm-revised.jsonl") if (folder / "vllm-revised.jsonl").exists() else []
    assert len(written) + (len(rows_in(rejected)) if rejected.exists() else 0) == 8
    assert "Traceback" not in done["revised"]["stderr"]


def test_red_team_prompts_are_written(folder: Path, done: dict[str, Any]) -> None:
    assert done["red-team"]["code"] == 0, done["red-team"]["stderr"]
    prompts = rows_in(folder / "vllm-red-team.jsonl")
    assert prompts  # a random model writes few that pass the checks
    assert all(len(row["prompt"][0]["content"].split()) >= 4 for row in prompts)


def test_a_window_larger_than_the_models_is_vllms_failure_in_one_line(done: dict[str, Any]) -> None:
    assert done["failed"]["code"] == 1
    errors = [line for line in done["failed"]["stderr"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: vLLM failed: ")
    assert "bug of cai" not in done["failed"]["stderr"]


def test_rl_trains_on_replies_that_vllm_samples_with_the_weights_of_each_step(
    folder: Path, done: dict[str, Any]
) -> None:
    assert done["rl"]["code"] == 0, done["rl"]["stderr"]
    manifest = manifest_of(folder / "policy")
    assert manifest["provenance"]["settings"]["rollouts"] == "vllm"
    assert manifest["run"]["training"]["rollouts"].startswith("vllm, 0.")
    assert "another run samples other replies" in manifest["run"]["training"]["replies"]
    steps = [row for row in rows_in(folder / "policy/metrics.jsonl") if row["loss"] is not None]
    assert [row["step"] for row in steps] == [1, 2, 3]
    # With the weights of the step before, the difference is above 0.1 from step 2 on.
    assert all(row["sampling_logp_difference"] < 1e-3 for row in steps)
    assert all(row["importance_weight"] == pytest.approx(1, abs=1e-2) for row in steps)
    assert largest_difference(folder / "tiny", folder / "policy") > 1e-3


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    # Its command `vllm serve` looks for the metadata of a package of that name, which the CPU build has not.
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", "tiny", "--served-model-name", "tiny"]
    words += ["--host", "127.0.0.1", "--port", port, "--enforce-eager", "--max-num-seqs", 16, "--dtype", "float32"]
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(
        [str(w) for w in words], cwd=folder, env=os.environ | ENV, stdout=log, stderr=log, start_new_session=True
    )
    try:
        for _ in range(6000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)
        else:
            raise AssertionError("the server did not start")
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def kill_after(process: subprocess.Popen[bytes], log: Path, requests: int) -> None:
    """Kill the server once it has answered this many requests."""
    while log.read_bytes().count(b"POST /v1/chat/completions") < requests:
        if process.poll() is not None:
            return
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)


def test_a_run_goes_on_after_its_server_was_killed_in_the_middle_and_started_again(
    folder: Path, cai: Cai, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "many.txt").write_text("".join(f"Name fruit number {i}.\n" for i in range(24)))
    words = ["sample", "many.txt", "-o", "served.jsonl", "-m", "openai:tiny", "--base-url", f"http://127.0.0.1:{port}/v1",
             "--max-new-tokens", "8", "--temperature", "0", "--concurrency", "1", "--json"]  # fmt: skip
    with server(folder, port) as process:
        killer = threading.Thread(target=kill_after, args=(process, folder / "server.log", 6))
        killer.start()
        died = cai(*words)
        killer.join()
    assert (died.code, died.error) == (1, "server-unreachable")
    partial = rows_in(folder / "served.jsonl.partial")
    assert 0 < len(partial) < 24
    with server(folder, port):
        done: Any = cai(*words)
        assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["out"] == 24
    rows = rows_in(folder / "served.jsonl")
    assert rows[: len(partial)] == partial
    local = cai("sample", "many.txt", "-m", "tiny", "-o", "own.jsonl", "--max-new-tokens", "8", "--temperature", "0")
    assert local.code == 0
    same = [a["completion"] == b["completion"] for a, b in zip(rows, rows_in(folder / "own.jsonl"), strict=True)]
    assert sum(same) >= 20  # servers sample from the text of the chat; float32 sums differ in their last bits
