"""Training with weights that are divided among the processes: FSDP2 of torch, ZeRO-3 of DeepSpeed.

Weights are loaded on the CPU (FSDP) or divided as they are read (ZeRO-3), so no GPU holds a whole model while it is
loaded. A forward pass gathers the weights of a layer for its duration and needs every process. What rank 0 otherwise
computes alone is therefore computed by all processes together, or from weights that `whole_weights` has gathered.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import UsageError
from cai_cli.models.adapters import is_adapted
from cai_cli.training import distributed
from cai_cli.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor


def refuse_unsupported() -> None:
    """Check how the launcher divides the weights.

    Raises:
        UsageError: The trained weights could not be gathered (`sharded-weights`).
    """
    env = os.environ.get
    if env("ACCELERATE_USE_FSDP") == "true":
        if env("FSDP_VERSION", "1") != "2":
            raise UsageError("FSDP must be version 2", hint="fsdp_version: 2 in the config", code="sharded-weights")
        if env("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":  # others are read with pickle
            raise UsageError(
                "FSDP must save the full weights",
                hint="fsdp_state_dict_type: FULL_STATE_DICT in the config",
                code="sharded-weights",
            )
    if env("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and env("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") != "true":
        raise UsageError(
            "ZeRO-3 must gather the weights that it saves",
            hint="zero3_save_16bit_model: true in the config",
            code="sharded-weights",
        )


@contextmanager
def announced(arguments: dict[str, Any]) -> Iterator[None]:
    """The context in which the model to train is loaded: with ZeRO-3, transformers divides weights as it reads them.

    Args:
        arguments: Keyword arguments for the trainer's config.
    """
    if not is_zero3():
        yield
        return
    from transformers import TrainingArguments

    with quiet_libraries():
        announcement = TrainingArguments(**arguments)  # transformers divides weights while this exists
        yield
        del announcement


@contextmanager
def whole_weights(trainer: Any, *, reference: bool = False) -> Iterator[Any]:
    """The trainer's model with its whole weights in every process. Called on every rank, after training has begun.

    Sharded weights are gathered for the duration of the context, in the precision of forward passes. Forward passes in
    the context do not wait for other processes.

    Args:
        trainer: A trainer of TRL.
        reference: Whether its reference model is gathered too.
    """
    with ExitStack() as stack:
        if distributed.weights_are_sharded():
            stack.enter_context(_gathered(trainer.model_wrapped, trainer))
            if reference and getattr(trainer, "ref_model", None) is not None:
                stack.enter_context(_gathered(trainer.ref_model, trainer))
        yield trainer.accelerator.unwrap_model(trainer.model)


@contextmanager
def _gathered(model: Any, trainer: Any) -> Iterator[None]:
    if is_zero3():
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(model, trainer.accelerator) as module:
            # DeepSpeed's own hook, which TRL leaves, would compare the processes' progress in every forward pass.
            hooks, module._forward_pre_hooks = module._forward_pre_hooks, OrderedDict()
            try:
                yield
            finally:
                module._forward_pre_hooks = hooks
        return
    import torch

    model.set_reshard_after_forward(False)
    try:
        with torch.no_grad():  # torch requires that a pass through the outermost module comes first
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=trainer.accelerator.device))
        for unit in _units(model):
            unit.unshard()
        yield
    finally:
        for unit in _units(model):
            unit.reshard()
        model.set_reshard_after_forward(trainer.accelerator.state.fsdp_plugin.reshard_after_forward)


def _units(model: Any) -> list[Any]:
    """The parts of a model whose weights FSDP gathers together."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_weights(trainer: Any) -> dict[str, "Tensor"]:
    """The weights to save, by name, on the CPU of rank 0; called on every rank. Of a model with adapters only what is
    trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_adapted(model):
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return {name: weights[name] for name in set(weights or ()) - set(model.all_tied_weights_keys)}
    if is_zero3():
        import deepspeed

        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: weight.detach().cpu().clone() for name, weight in trained.items()}
    for unit in _units(model):  # one that was gathered for a forward pass may still be
        unit.reshard()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight.detach().full_tensor().cpu() for name, weight in trained.items()}


def is_zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 divides the weights."""
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
