"""Sharded weights: two processes on gloo that share the weights give what one process with all of them gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import largest_difference, preference, revision, rows_in, stage, write_rows
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cai_cli.common.errors import UsageError
from cai_cli.models.loading import load_causal_lm
from cai_cli.models.shards import unread_here, without_weights
from cai_cli.training import sharding

TESTS = Path(__file__).parents[1]
SAME = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "reward", "reward_std", "kl", "cut_off_share",
        "held_out_loss", "held_out_accuracy", "pm_score", "held_out_kl", "reply_tokens", "nll")  # fmt: skip
EPOCHS: dict[str, Any] = {"batch_size": 4, "eval_share": 0.112, "max_steps": 3}
STEPS: dict[str, Any] = {"pm": "pm", "steps": 3, "monitor_every": 2, "prompts_per_step": 2, "samples_per_prompt": 4,
                         "max_new_tokens": 8}  # fmt: skip
STAGES = {
    "sft": ("rev.jsonl", EPOCHS),
    "train-pm": ("prefs.jsonl", EPOCHS),
    "dpo": ("prefs.jsonl", {**EPOCHS, "monitor_prompts": 0}),  # no replies are sampled from sharded weights
    "rl": ("prompts.txt", STEPS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a preference model, and rows for each stage in numbers that the effective batch of 8 divides."""
    made = tmp_path_factory.mktemp("shards")
    tiny_model_dir(made / "tiny")
    write_rows(made / "rev.jsonl", [revision(i, f"answer {i * 7}" + " more" * (i % 5)) for i in range(36)])
    pairs = [preference(i, 0.6 + i / 100, f"helpful {i}" + " x" * (i % 7), f"toxic {i}") for i in range(36)]
    write_rows(made / "prefs.jsonl", pairs)
    (made / "prompts.txt").write_text("".join(f"question number {i}\n" for i in range(12)))
    stage("train-pm")(str(made / "prefs.jsonl"), made / "pm", model=str(made / "tiny"), learning_rate=1e-3, quiet=True)
    return made


def run(name: str, output: str, accumulation: int, **more: Any) -> tuple[str, str, str, dict[str, Any]]:
    """A run of which one process with `accumulation` 2 and two with 1 take the same steps."""
    source, options = STAGES[name]
    steps = {} if name == "rl" else {"gradient_accumulation": accumulation}
    return name, source, output, {"model": "tiny", "learning_rate": 1e-3, "save_steps": 2, **options, **steps, **more}


def run_sharded(folder: Path, runs: list[Any], config: str = "fsdp2") -> None:
    """Make the runs in two processes, with a config that TRL ships."""
    (folder / "runs.json").write_text(json.dumps(runs))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(sharding_config(config))]
    launch += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "training")])
    done = subprocess.run(
        [*launch, "--module", "sharded_stages", str(folder / "runs.json")],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def sharding_config(name: str) -> Path:
    from cai_cli.training.launcher import config_path

    return config_path(name)


def assert_same_training(one: Path, other: Path) -> None:
    """To 1e-4, absolute and relative: sums in another order, for steps of a large learning rate."""
    a, b = rows_in(one / "metrics.jsonl"), rows_in(other / "metrics.jsonl")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, twin in zip(a, b, strict=True):
        known = {name: row[name] for name in SAME if row.get(name) is not None}
        if row["step"] == 1 and "margin" in row:
            known.pop("accuracy", None)  # of dpo: all margins are 0, up to rounding
        assert known == pytest.approx({name: twin[name] for name in known}, rel=1e-4, abs=1e-4), row["step"]
    assert largest_difference(one, other) < 1e-4


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_do_also_after_a_kill(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [(name, lora) for name in STAGES for lora in (False, True)]
    monkeypatch.chdir(folder)
    killed = run("sft", "sft-killed", 1, lora=False, max_steps=6)
    interrupted = [(*each[:3], {**each[3], "interrupt_after": 5}) for each in (killed,)]
    sharded = [run(name, f"{name}-{lora}", 1, lora=lora) for name, lora in kinds]
    run_sharded(folder, [*interrupted, killed, run("sft", "sft-whole", 1, lora=False, max_steps=6), *sharded])
    assert_same_training(folder / "sft-whole", folder / "sft-killed")
    for name, lora in kinds:
        _, source, output, options = run(name, f"{name}-{lora}-alone", 2, lora=lora)
        stage(name)(source, output, device="cpu", quiet=True, **options)
        assert_same_training(folder / f"{name}-{lora}", folder / output)
        if name == "rl":
            replies = [[row["completion"] for row in rows_in(folder / out / "samples.jsonl")]
                       for out in (f"{name}-{lora}", output)]  # fmt: skip
            assert replies[0] == replies[1]


def test_a_process_that_receives_its_weights_reads_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not unread_here()
    names = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert unread_here()
    monkeypatch.setattr("safetensors.safe_open", None)
    empty = load_causal_lm(folder / "tiny", "bfloat16", "cuda", sharded=True)
    assert {weight.device.type for weight in empty.parameters()} == {"cpu"}
    assert empty.dtype is torch.bfloat16
    # accelerate tells weights apart by their addresses.
    assert len({weight.data_ptr() for weight in empty.parameters()}) == len(list(empty.parameters()))


def test_a_model_without_weights_is_otherwise_the_model(folder: Path) -> None:
    path = folder / "tiny"
    empty, whole = without_weights(AutoModelForCausalLM, path, torch.float32), load_causal_lm(path)
    assert {name: w.shape for name, w in empty.state_dict().items()} == {
        name: w.shape for name, w in whole.state_dict().items()
    }
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(empty.buffers(), whole.buffers(), strict=True))
    assert empty.generation_config == whole.generation_config
    classifier = without_weights(AutoModelForSequenceClassification, path, torch.float32, num_labels=1)
    assert classifier.score.weight.shape == (1, 32)


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
    ],
)
def test_weights_that_could_not_be_gathered_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding.refuse_unsupported()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        sharding.refuse_unsupported()
    assert error.value.code == "sharded-weights"
