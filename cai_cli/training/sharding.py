"""Training with weights that are divided among the processes: FSDP2 of torch, ZeRO-3 of DeepSpeed.

Weights are loaded on the CPU (FSDP) or divided as they are read (ZeRO-3), so no GPU holds a whole model while it is
loaded. A forward pass gathers the weights of a layer for its duration and needs every process. What rank 0 otherwise
computes alone is therefore computed by all processes together, or from weights that `whole_weights` has gathered.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cai_cli.common.errors import UsageError
from cai_cli.training import distributed

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


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
def loading(arguments: dict[str, Any]) -> Iterator[bool]:
    """The context in which a trainer's model is loaded.

    Args:
        arguments: Keyword arguments for the trainer's config.

    Yields:
        Whether the weights are to be sharded, for `load_causal_lm` and `load_reward_model`.
    """
    announced = None
    if is_zero3():
        from transformers import TrainingArguments

        announced = TrainingArguments(**arguments)  # transformers divides weights as it reads them while this exists
    yield distributed.weights_are_sharded()
    del announced


def with_all_weights(make: Callable[[], T]) -> T:
    """Return the result of `make` on every rank. It is called on rank 0, or on all ranks where weights are sharded."""
    return make() if distributed.weights_are_sharded() else distributed.from_rank_zero(make)


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

        with unwrap_model_for_generation(model, trainer.accelerator):
            yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        model.set_reshard_after_forward(trainer.accelerator.state.fsdp_plugin.reshard_after_forward)


def gathered_weights(trainer: Any) -> dict[str, "Tensor"]:
    """The weights to save, by name, on the CPU of rank 0; called on every rank. Of a model with adapters only what is
    trained."""
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(model):
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return {name: weights[name] for name in set(weights or ()) - set(model.all_tied_weights_keys)}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if is_zero3():
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: weight.detach().cpu().clone() for name, weight in trained.items()}
    return {name: weight.detach().full_tensor().cpu() for name, weight in trained.items()}


def is_zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 divides the weights."""
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
