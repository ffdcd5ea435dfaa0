"""Run several `cai` commands in one process of vLLM's environment, where those with equal settings share one start.

    python tests/vllm_commands.py RESULTS < commands.json

Reads a JSON list of argument lists; writes a JSON list of {"code", "stderr"} to RESULTS.

On a CPU vLLM packs the weights of a model once and drops them, so that `cai rl` cannot replace them; here it keeps
them, as it does for the layers that it does not pack. Everything else is vLLM and TRL as they are.
"""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.model_executor.layers import utils

from cai_cli.cli.app import main
from cai_cli.engines.choice import Machine
from cai_cli.phase2_feedback import rl

LLM = vllm.LLM


@cache
def started(settings: str) -> Any:
    return LLM(**json.loads(settings))


def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def use_for_rollouts() -> None:
    """Let `cai rl` use vLLM on this CPU, in float32 and without compilation."""
    from trl.generation import vllm_generation

    utils.dispatch_cpu_unquantized_gemm = keep_weights
    rl.this_machine = lambda device: Machine(True, True, lambda: ["LlamaForCausalLM"])
    vllm_generation.LLM = lambda **settings: LLM(**settings, enforce_eager=True, dtype="float32")


def run(words: list[str]) -> dict[str, Any]:
    sys.argv = ["cai", *words]
    if words[0] == "rl":
        use_for_rollouts()
    with open("stderr.txt", "w+b") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
        file.seek(0)
        return {"code": code, "stderr": file.read().decode(errors="replace")}


if __name__ == "__main__":  # vLLM starts processes that import this file
    vllm.LLM = lambda **settings: started(json.dumps(settings))
    results, commands = Path(sys.argv[1]), json.load(sys.stdin)
    results.write_text(json.dumps([run(words) for words in commands]))
