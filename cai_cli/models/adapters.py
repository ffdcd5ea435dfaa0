"""Models with LoRA adapters."""

from typing import Any


def finished_model(trainer: Any) -> Any:
    """The trained model of a trainer, with any LoRA adapters merged into its weights."""
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if is_peft_model(model) else model


def without_adapter_wrapper(policy: Any) -> Any:
    """The model inside its LoRA wrapper; its layers still contain the adapters."""
    from accelerate.utils import is_peft_model

    return policy.get_base_model() if is_peft_model(policy) else policy
