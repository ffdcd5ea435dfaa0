"""The benchmarks that run elsewhere: their commands are valid, and what they prepare can be loaded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cai_cli.cli.app import build_app

BENCH = Path(__file__).parents[2] / "bench"
COMMANDS: dict[str, Any] = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]

# Stands for Python: records what it is started with, and leaves behind what a stage would.
RECORDER = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if words[0] == "-":
    os.execv({sys.executable!r}, [{sys.executable!r}, *words])
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps(words), file=record)
if "-o" in words:
    output = words[words.index("-o") + 1]
    training = {{"seconds": 3.0, "tokens_per_second": 7.0}} if words[2] in ("sft", "train-pm", "rl", "dpo") else {{}}
    manifest = {{"counts": {{"in": 5, "rejected": 1}}, "metrics": {{"steps": 2}}, "provenance": {{"settings": {{}}}},
                "run": {{"seconds": 9.0, "training": training}}}}
    with open(output + ".manifest.json", "w") as file:
        json.dump(manifest, file)
print(0)
"""


def gpu_check(folder: Path, **environment: str) -> tuple[int, str]:
    """The exit code and the table of a run of `gpu_check.sh`."""
    done = subprocess.run(
        ["bash", str(BENCH / "gpu_check.sh"), "", str(folder / "out")],
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    return done.returncode, (folder / "out/table.md").read_text()


def test_the_gpu_check_runs_valid_commands_and_writes_a_row_for_each(tmp_path: Path) -> None:
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)
    code, table = gpu_check(tmp_path, PYTHON=str(python), RECORD=str(record))
    assert code == 0
    assert "every step ran" in table
    notes = dict(re.findall(r"^\| (\S+) \| \d+ \| ok \| [^|]+ \| (.*) \|$", table, re.MULTILINE))
    assert notes["rl-lora-large"] == "5 rows, 9.0 s, 1 rejected, 7.0 tokens/s, 1.50 s a step"
    assert notes["samples.jsonl"] == "5 rows, 9.0 s, 1 rejected"
    assert "| engine-vllm | - | left out |" in table
    commands = [json.loads(line) for line in record.read_text().splitlines()]
    stages = [words[2:] for words in commands if words[:2] == ["-m", "cai_cli"] and "-o" in words]
    assert {"sample", "critique-revise", "sft", "label-prefs", "train-pm", "rl", "score"} <= {
        name for name, *_ in stages
    }
    for name, *words in stages:
        if name in COMMANDS:
            COMMANDS[name].make_context(name, words)


def test_the_busy_benchmark_runs_valid_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import busy

    for stage in busy.STAGES:
        name, *words = busy.command_line(stage, "model", "out")
        COMMANDS[name].make_context(name, words)


def test_the_gpu_check_stops_at_the_first_import_that_fails(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no libcudart.so.13')\n")
    code, table = gpu_check(tmp_path, PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert table.splitlines()[-1].endswith("import torch: ImportError: no libcudart.so.13 |")
    assert len(table.splitlines()) == 3


@pytest.mark.parametrize("shard_bytes", [2 << 30, 10_000])
def test_a_random_llama_is_a_model_of_bfloat16_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import random_llama
    import torch
    from transformers import AutoModelForCausalLM

    from cai_cli.engines.base import Completion, GenerationRequest, Sampling
    from cai_cli.engines.local.engine import LocalEngine

    monkeypatch.setattr(random_llama, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(sys, "argv", ["random_llama.py", str(tmp_path / "model"), "--shape", "tiny"])
    random_llama.main()
    engine = LocalEngine(str(tmp_path / "model"), batch_size=None, device="cpu", dtype="float32")
    (reply,) = engine.generate([GenerationRequest("some text", 0)], Sampling(4))
    assert isinstance(reply, Completion)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    assert all(value.dtype == torch.bfloat16 for value in weights.values())
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(weights["model.norm.weight"].mean()) == 1.0
