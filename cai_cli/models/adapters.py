"""Models with LoRA adapters."""

from pathlib import Path
from typing import Any

from cai_cli.models.loading import load_causal_lm, load_reward_model


def finished_model(trainer: Any) -> Any:
    """The trained model of a trainer, with any LoRA adapters merged into its weights."""
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if is_peft_model(model) else model


def without_adapter_wrapper(policy: Any) -> Any:
    """The model inside its LoRA wrapper; its layers still contain the adapters."""
    from accelerate.utils import is_peft_model

    return policy.get_base_model() if is_peft_model(policy) else policy


def is_adapted(model: Any) -> bool:
    """Whether a model has LoRA adapters."""
    from accelerate.utils import is_peft_model

    return bool(is_peft_model(model))


def merged_model(config: Any, weights: dict[str, Any], dtype: Any) -> Any:
    """The model that adapters were trained on, loaded again on the CPU, with the adapters merged into its weights.

    Args:
        config: The LoRA config of the adapters, which names the directory of that model.
        weights: The trained weights by their names in the model with adapters.
        dtype: The torch data type of the model's weights.
    """
    from peft import TaskType, get_peft_model

    path, precision = Path(config.base_model_name_or_path), str(dtype).removeprefix("torch.")
    classifier = config.task_type == TaskType.SEQ_CLS
    base = load_reward_model(path, precision, new_head_seed=0) if classifier else load_causal_lm(path, precision)
    model = get_peft_model(base, config)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise AssertionError(f"weights that the model does not have: {unknown[:3]}")
    return model.merge_and_unload()
