"""The local engine around a model in training, whose replies `rl` and `dpo` score."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.local.onednn import pack_linears
from cai_cli.engines.local.prefix_cache import enable_prefix_cache


@contextmanager
def engine_around(
    model: Any, tokenizer: Any, batch_size: int | None, *, sharded: bool = False
) -> Iterator[LocalEngine]:
    """A context with an engine that answers with the current weights of `model`, such as a model in training.

    It is a `LocalEngine` without `identity`. Under autocast it runs the model's own attention and layers, because its
    replies must have the logits that training computes in bfloat16: the engine's own attention rounds them otherwise
    (0.01 nat a token). Within the context the model cannot be trained; afterwards it is as before.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        batch_size: As in `LocalEngine`.
        sharded: Whether its weights are sharded and gathered for now. Then too it runs the model's own layers: FSDP
            keeps account of their passes, and the processes would disagree on it after others.
    """
    import torch

    engine = LocalEngine("", batch_size=batch_size, device=model.device.type, dtype="auto")
    attention, was_training = model.config._attn_implementation, model.training
    model.eval()
    engine.model, engine.tokenizer = model, tokenizer
    as_in_training = sharded or torch.is_autocast_enabled(model.device.type)
    engine.uses_prefix_cache = not as_in_training and enable_prefix_cache(model)
    linears = {} if as_in_training else pack_linears(model)
    try:
        yield engine
    finally:
        for name, layer in linears.items():
            model.set_submodule(name, layer)
        if engine.uses_prefix_cache:
            model.set_attn_implementation(attention)
        model.train(was_training)
