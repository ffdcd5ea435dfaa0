"""The memory of models of common sizes on H100s, planned as by `cai run --dry-run`: a table of docs/scale.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cai_cli.pipeline import registry
from cai_cli.pipeline.memory_estimate import setting_of
from cai_cli.runtime.cost import RowFlow
from cai_cli.training.activations import ModelShape, shape_of
from cai_cli.training.memory import GIB
from cai_cli.training.memory_check import H100, Setting

TOKENS = {"rl": 256}  # of a prompt; other rows have 1,024 with the reply
COLUMNS = ("weights", "gradients", "optimizer", "activations", "rollouts", "other models", "communication")


@dataclass(frozen=True)
class Case:
    """A command: the size of the model, the stage, its options by their names, and the GPUs of a machine."""

    model: str
    stage: str
    options: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The stage and its options, as on a command line."""
        words = [self.stage]
        for name, value in self.options.items():
            words += [f"--{name}"] if value is True else [f"--{name} {value}"]
        return " ".join(words)


LORA, QLORA = {"lora": True}, {"lora": True, "quantize": "4bit"}
STEP = {"prompts-per-step": 16, "batch-size": 16, "max-new-tokens": 256}


def _fsdp(count: int) -> dict[str, Any]:
    return {"accelerate-config": "fsdp2", "num-processes": count}


def _each(model: str, stages: str, options: Mapping[str, Any]) -> list[Case]:
    return [Case(model, stage, options) for stage in stages.split()]


CASES = {
    "One H100": [
        *_each("8B", "sft train-pm dpo", LORA),
        Case("8B", "rl", {**LORA, "rollouts": "vllm", **STEP}),
        *_each("8B", "sft train-pm dpo", QLORA),
        Case("8B", "rl", {**QLORA, "rollouts": "local", **STEP}),
        *_each("70B", "sft train-pm dpo", QLORA),
    ],
    "Eight H100": [
        *_each("8B", "sft train-pm dpo", _fsdp(8)),
        Case("8B", "rl", {"rollouts": "vllm", **STEP, **_fsdp(8)}),
        *_each("32B", "sft train-pm", _fsdp(8)),
        *_each("32B", "dpo", {**LORA, **_fsdp(8)}),
        Case("32B", "rl", {**QLORA, "rollouts": "local", **STEP, "accelerate-config": "multi_gpu"}),
        *_each("70B", "sft train-pm dpo", {**LORA, **_fsdp(8)}),
        Case("70B", "rl", {**QLORA, "rollouts": "local", **STEP, "accelerate-config": "multi_gpu"}),
    ],
    "Two nodes with eight H100 each": [
        *_each("32B", "sft train-pm dpo", _fsdp(16)),
        *_each("70B", "sft train-pm dpo", {**LORA, "batch-size": 8, "gradient-accumulation": 1, **_fsdp(16)}),
    ],
    "Four nodes with eight H100 each": _each("70B", "sft train-pm dpo", _fsdp(32)),
}
# Commands that do not fit, for which the page names the nearest settings that do.
REFUSED = [Case("8B", "sft", {}), Case("8B", "rl", STEP), Case("70B", "sft", {**LORA}), Case("70B", "sft", _fsdp(16))]


@cache
def shapes() -> dict[str, ModelShape]:
    """Llama 3.1 8B and 70B, and Qwen3 32B."""
    from transformers import LlamaConfig, Qwen3Config

    llama: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    configs = {
        "8B": LlamaConfig(
            hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **llama
        ),
        "32B": Qwen3Config(
            hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64, head_dim=128,
            vocab_size=151_936, num_key_value_heads=8, max_position_embeddings=40_960,
        ),
        "70B": LlamaConfig(
            hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, **llama
        ),
    }  # fmt: skip
    return {name: shape_of(config) for name, config in configs.items()}


def planned(case: Case) -> Setting:
    """The case on H100s; its preference model has 8B."""
    config = registry.STAGES[case.stage].config
    names, options = config.option_names(), config.options()
    values: dict[str, Any] = {name: "-" for name, (field, _) in options.items() if field.is_required()}
    values |= {"model": case.model} | ({"pm": "8B"} if case.stage == "rl" else {})
    # Not checked as a command line is: the packages need not be installed here.
    built = config.model_validate(values | {names[name]: value for name, value in case.options.items()})
    mean = TOKENS.get(case.stage, 1024) // 2
    return setting_of(built, RowFlow(1, 1, mean, 0), shapes(), H100)


def memory_table() -> str:
    """The cases as the Markdown table of docs/scale.md, in GiB on each GPU."""
    lines = [f"| model | command | {' | '.join(COLUMNS)} | all |", "|---|---|" + "---:|" * (len(COLUMNS) + 1)]
    for machine, cases in CASES.items():
        lines.append(f"| **{machine}** |{' |' * (len(COLUMNS) + 2)}")
        for case in cases:
            memory = planned(case).memory
            sizes = dict(memory.parts)
            sizes["other models"] = sizes.pop("reference", 0.0) + sizes.pop("preference models", 0.0)
            cells = [f"{sizes[name] / GIB:.1f}" if sizes.get(name) else "" for name in COLUMNS]
            lines.append(f"| {case.model} | `{case.command}` | {' | '.join(cells)} | {memory.peak / GIB:.1f} |")
    return "\n".join(lines)


def refusals() -> str:
    """What `cai` says about the cases that do not fit, as a block of text."""
    from cai_cli.common.errors import CaiError

    blocks = []
    for case in REFUSED:
        try:
            planned(case).refuse_impossible(case.stage)
        except CaiError as error:
            blocks.append(f"{case.model}: cai {case.command}\n  error: {error.message}\n  hint: {error.hint}")
    return "\n".join(blocks)
