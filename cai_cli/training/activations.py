"""The shape of a model and the memory of its activations, from its config alone.

The model is built on the meta device, so no weight is loaded. Activations are those of transformers' own code: one
forward and backward pass runs on fake tensors, which have shapes but no data, and every storage is counted while it
lives. Layers are alike, so two passes, with one layer and with two, give the memory of any number.
"""

import json
import sys
import weakref
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a model depends on.

    Attributes:
        config: Its config as JSON.
        parameters: All parameters, those of a language model's head included.
        head: Parameters of the head that no other layer shares; 0 where it is the embedding.
        linear: Parameters of the linear layers, which `--quantize` quantises and `--lora` adapts; not of the head.
        adapter_width: Parameters of its adapters at rank 1.
        layers: Number of layers.
        layer: Parameters of the largest layer.
        hidden: Size of the hidden states.
        vocabulary: Number of tokens.
        kv_values: Numbers in the KV cache for each token.
        window: The context window in tokens.
    """

    config: str
    parameters: int
    head: int
    linear: int
    adapter_width: int
    layers: int
    layer: int
    hidden: int
    vocabulary: int
    kv_values: int
    window: int

    @property
    def scorer(self) -> int:
        """Parameters with a scalar head instead of that of a language model."""
        return self.parameters - self.head + self.hidden


@dataclass(frozen=True)
class Pass:
    """What a pass through the layers depends on, beside the model.

    Attributes:
        rows: Sequences in the batch.
        length: Their length in tokens.
        weights: Precision of the weights.
        precision: Precision of the computation.
        lora_rank: Rank of the adapters; None where all weights are trained.
        checkpointing: Whether activations are computed again in the backward pass.
        attention: The implementation of attention; None for the default.
    """

    rows: int
    length: int
    weights: str
    precision: str
    lora_rank: int | None
    checkpointing: bool
    attention: str | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights, gradients and the optimiser.

    Attributes:
        kept: After the forward pass through the layers, before the head.
        peak: At the most during the backward pass.
    """

    kept: float
    peak: float


@cache
def shape_of_dir(path: Path) -> ModelShape:
    """The shape of the model in a directory, of which only `config.json` is read."""
    from transformers import AutoConfig

    from cai_cli.models.fetch import loading

    with loading(path):
        return shape_of(AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True))  # nosec B615


def shape_of(config: Any) -> ModelShape:
    """The shape of the language model with this config of transformers."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    blocks = [part for part in model.modules() if type(part).__name__ in (model._no_split_modules or ())]
    query_heads = getattr(config, "num_attention_heads", 1)  # Mamba has none; its state is smaller than keys and values
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return ModelShape(
        config=config.to_json_string(use_diff=False),
        parameters=_count(model),
        head=0 if tied else _count(head),
        linear=sum(part.weight.numel() for part in linear),
        adapter_width=sum(part.in_features + part.out_features for part in linear),
        layers=config.num_hidden_layers,
        layer=max(map(_count, blocks), default=0),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        kv_values=2 * config.num_hidden_layers * heads * head_size,
        window=getattr(config, "max_position_embeddings", None) or sys.maxsize,
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def activations(shape: ModelShape, of: Pass) -> Activations | None:
    """The activations of all layers, without the head.

    Mixtures of experts can be traced with weights in bfloat16 only, which leaves out the copies that autocast makes of
    float32 weights. Where that fails too, the model's code needs the values of tensors, and the result is None.
    """
    first, second = _traced(shape.config, of, 1), _traced(shape.config, of, 2)
    if first is None or second is None:
        in_half = replace(of, weights="bfloat16", precision="bfloat16")
        return None if of == in_half else activations(shape, in_half)
    more = shape.layers - 1
    return Activations(
        first.kept + more * (second.kept - first.kept), first.peak + more * max(0.0, second.peak - first.peak)
    )


@cache
def _traced(config: str, of: Pass, layers: int) -> Activations | None:
    """The activations of a model that is cut to its first layers."""
    import logging

    import torch

    fake_log = logging.getLogger("torch._subclasses.fake_tensor")
    level = fake_log.level
    fake_log.setLevel(logging.CRITICAL)  # a pass that cannot be traced is not an error here
    try:
        return _trace(_cut_model(config, of, layers), of)
    except (RuntimeError, NotImplementedError, TypeError, torch._subclasses.fake_tensor.UnsupportedFakeTensorException):
        return None
    finally:
        fake_log.setLevel(level)


def _cut_model(config: str, of: Pass, layers: int) -> Any:
    """The model without its head, with some of its layers and adapters, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModel

    fields = json.loads(config)
    number = fields["num_hidden_layers"]
    cut = {key: value[:layers] for key, value in fields.items() if isinstance(value, list) and len(value) == number}
    short = AutoConfig.for_model(**fields | cut | {"num_hidden_layers": layers})
    with torch.device("meta"):
        implementation = {"attn_implementation": "eager"} if of.attention == "eager" else {}
        model = AutoModel.from_config(short, dtype=getattr(torch, of.weights), **implementation)
        if of.lora_rank is not None:
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(r=of.lora_rank, target_modules="all-linear"), model)
    return model


def _trace(model: Any, of: Pass) -> Activations:
    """The activations of one forward and backward pass, with gradients from an earlier one."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cpu"):
        _without_data(model)
        model.train()
        if of.checkpointing:
            model.activation_checkpointing_enable()
            if of.lora_rank is not None:
                model.enable_input_require_grads()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        ids = torch.zeros(of.rows, of.length, dtype=torch.long)
        mask = torch.ones_like(ids)
        with _live_storages(model) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=of.precision == "bfloat16"):
                hidden = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                kept = live.now
            hidden.backward(torch.zeros_like(hidden))
        return Activations(kept, live.peak)


def _without_data(model: Any) -> None:
    """Replace the tensors of a model on the meta device by fake ones on the CPU, tied ones by the same one."""
    import torch

    made: dict[int, Any] = {}
    for part in model.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(value) not in made:
                fake = torch.empty(value.shape, dtype=value.dtype)
                made[id(value)] = (
                    torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                    if isinstance(value, torch.nn.Parameter)
                    else fake
                )
            (part._parameters if name in part._parameters else part._buffers)[name] = made[id(value)]


def _live_storages(model: Any) -> Any:
    """A context that counts the bytes of all storages made in it that are alive: `now`, and at the most `peak`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            mine = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
            self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in mine)

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            for value in tree_leaves(results):
                if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self.known:
                    self.known.add(storage)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self.add, -storage.nbytes())
            return results

        def add(self, size: int) -> None:
            self.now += size
            self.peak = max(self.peak, self.now)

    return LiveStorages()
