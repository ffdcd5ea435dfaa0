"""Models with LoRA adapters."""

import json
from pathlib import Path
from typing import Any

from cai_cli.models.fetch import ADAPTER_CONFIG, published_name
from cai_cli.models.loading import load_float32_copy


def finished_model(trainer: Any) -> Any:
    """The trained model of a trainer, with any LoRA adapters merged into its weights in float32."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return merged(model) if is_adapted(model) else model


def merged(adapted: Any) -> Any:
    """A model with its LoRA adapters merged into its weights, in float32.

    Where the weights under the adapters are in another precision, the original ones are loaded again on the CPU:
    most changes of a short training are smaller than the rounding of bfloat16, and 4-bit weights are not the model's.

    Args:
        adapted: A model of PEFT around one of `loading`; it cannot be used afterwards.
    """
    import torch

    base = adapted.get_base_model()
    if base.dtype == torch.float32 and not getattr(base, "is_quantized", False):
        return adapted.merge_and_unload()
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    return merged_copy(adapted, {name: weight.detach().float().cpu() for name, weight in trained.items()})


def without_adapter_wrapper(policy: Any) -> Any:
    """The model inside its LoRA wrapper; its layers still contain the adapters."""
    return policy.get_base_model() if is_adapted(policy) else policy


def is_adapted(model: Any) -> bool:
    """Whether a model has LoRA adapters."""
    from accelerate.utils import is_peft_model

    return bool(is_peft_model(model))


def merged_copy(adapted: Any, weights: dict[str, Any]) -> Any:
    """The model under adapters, loaded again on the CPU in float32, with the adapters merged into its weights.

    Args:
        adapted: A model of PEFT around one of `loading`, of which this process may hold a part only.
        weights: The weights that are trained, by their names in `adapted`.
    """
    from peft import get_peft_model

    again = get_peft_model(load_float32_copy(adapted.get_base_model()), adapted.active_peft_config)
    if unknown := again.load_state_dict(weights, strict=False).unexpected_keys:
        raise AssertionError(f"weights that the model does not have: {unknown[:3]}")
    return again.merge_and_unload()


def save_adapter(adapted: Any, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the adapter of a model as PEFT does, with the name of its base model instead of a folder of this machine.

    Args:
        adapted: A model of PEFT around one of `loading`.
        directory: Where the files are written.
        weights: The weights that are trained, by their names in `adapted`, where it holds a part of them only.
    """
    base = Path(adapted.get_base_model().config._name_or_path)
    adapted.save_pretrained(directory, state_dict=weights, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
    config = json.loads((directory / ADAPTER_CONFIG).read_bytes())
    config["base_model_name_or_path"] = published_name(base)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
