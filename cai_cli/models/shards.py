"""Loads models whose weights a trainer divides among processes (FSDP, ZeRO-3), and others beside them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def unread_here() -> bool:
    """Whether this process receives its share of the weights from the process that reads them, as FSDP does by its
    option `fsdp_cpu_ram_efficient_loading`."""
    reads_once = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true"
    return reads_once and os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("LOCAL_RANK", "0") != "0"


def without_weights(auto: Any, path: Path, dtype: Any, **options: object) -> Any:
    """The model in a directory with memory for its weights that is not touched, and therefore not taken, on the CPU.

    Args:
        auto: The class of transformers that loads it.
        path: The directory.
        dtype: The torch data type of its weights.
        options: More options of `from_pretrained`.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)  # nosec B615
    with init_empty_weights():
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    # Weights on the meta device would be taken for each other: accelerate tells them apart by their addresses.
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                empty = torch.nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                setattr(module, name, empty)
    model.tie_weights()
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)  # nosec B615
    return model.eval()


@contextmanager
def undivided() -> Iterator[None]:
    """A context in which transformers loads whole weights though the processes train with ZeRO-3."""
    from transformers.integrations import deepspeed

    announced = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = announced
