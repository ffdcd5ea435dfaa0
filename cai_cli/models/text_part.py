"""The language model inside a model that also takes images or sound. Only that part is run and trained."""

from typing import Any

# Mixers of Mamba read these layers' weights in kernels of their own, so PEFT refuses adapters there.
_NO_ADAPTERS = ("out_proj", "conv1d")
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def modules_beside_text(model: Any) -> dict[str, Any]:
    """The modules of a wrapper that are no part of its language model, such as a vision tower, by name."""
    if model.config.get_text_config() is model.config:
        return {}
    text = [part for part in (_decoder(model), model.get_output_embeddings(), getattr(model, "score", None)) if part]
    if not text or text[0] is model:
        return {}
    of_text = {id(module) for part in text for module in part.modules()}
    around = {id(module) for module in model.modules() if any(id(inner) in of_text for inner in module.modules())}
    return {name: module for name, module in model.named_modules() if id(module) not in of_text | around}


def _decoder(model: Any) -> Any:
    """The language model, also where it is inside a classifier, whose `get_decoder` does not find it."""
    inner = getattr(model.base_model, "language_model", None)
    return inner if inner is not None else model.get_decoder()


def freeze_beside_text(model: Any) -> None:
    """Exclude what is no part of the language model from training: no text changes it."""
    for module in modules_beside_text(model).values():
        module.requires_grad_(False)


def modules_without_adapters(model: Any) -> list[str]:
    """The names of the linear layers that get no adapters where all others do."""
    import torch

    beside = modules_beside_text(model)
    kind = model.config.model_type
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (name in beside or (kind in _MAMBA and name.rpartition(".")[2] in _NO_ADAPTERS))
    ]
