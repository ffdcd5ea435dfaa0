"""Which engine runs a model on this machine: vLLM on CUDA where it is installed and knows the model, else the local
engine."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cai_cli.common import console
from cai_cli.models.names import resolve

PREFIXES = ("openai:", "vllm:", "scripted:", "local:")  # of models whose engine is named


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Attributes:
        cuda: Whether models run on CUDA.
        vllm: Whether vLLM is installed, which is not looked up without CUDA.
        architectures: Returns the architectures that vLLM knows, as `config.json` names them.
    """

    cuda: bool
    vllm: bool
    architectures: Callable[[], Collection[str]]


def this_machine(device: str = "auto") -> Machine:
    """This machine, for models on a `--device`."""
    import torch

    cuda = device != "cpu" and torch.cuda.is_available()
    return Machine(cuda, cuda and find_spec("vllm") is not None, _vllm_architectures)


@cache
def _vllm_architectures() -> frozenset[str]:
    from vllm import ModelRegistry

    return frozenset(ModelRegistry.get_supported_archs())


def reason_against_vllm(path: Path, machine: Machine) -> str | None:
    """Why vLLM does not run the model in a directory on this machine; None where it does."""
    if not machine.cuda:
        return "there is no CUDA device"
    if not machine.vllm:
        return "vLLM is not installed (pip install '.[vllm]')"
    config = path / "config.json"
    names = json.loads(config.read_bytes()).get("architectures") if config.is_file() else None
    if unknown := sorted(set(names or ["a model without an architecture"]) - set(machine.architectures())):
        return f"vLLM does not know {unknown[0]}"
    return None


def with_engine(model: str, device: str) -> str:
    """`model` with the prefix of the engine that runs it on a `--device`, which is printed on a machine with CUDA.

    Raises:
        CaiError: There is no such model.
    """
    if model.startswith(PREFIXES):
        return model
    machine = this_machine(device)
    if not machine.cuda:
        return model
    # A model is fetched only where its config decides.
    reason = reason_against_vllm(resolve(model) if machine.vllm else Path(), machine)
    if reason:
        console.say(f"{model}: the local engine runs it, because {reason}")
        return f"local:{model}"
    console.say(f"{model}: vLLM runs it; local:{model} selects the local engine")
    return f"vllm:{model}"
