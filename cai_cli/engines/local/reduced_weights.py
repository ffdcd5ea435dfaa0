"""Linear layers with weights in bfloat16 or int8 on a CPU. Everything else of the model is computed in float32.

So the decoding step is the same for all three precisions, and reduced weights cost their own rounding and little more.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import UsageError
from cai_cli.engines.local.decode_kernels import address, library
from cai_cli.engines.local.onednn import ROWS
from cai_cli.engines.local.prefix_cache import MODEL_TYPES
from cai_cli.models.loading import model_type

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ROWS = 16  # oneDNN multiplies a few rows a hundred times slower than 16, where a layer has few outputs
_LOW = 254  # steps of the second 8-bit part of a number in one of the first


_INSTEAD = "use --dtype bfloat16 or float32"


def check_int8(device: str) -> None:
    """Raise UsageError unless this machine can run int8 weights on `device`."""
    import torch

    if device != "cpu":
        raise UsageError("--dtype int8 is for CPUs", hint=f"{_INSTEAD}, or --device cpu", code="option-conflict")
    # Without these instructions sums of two products overflow 16 bits.
    if not torch.cpu.get_capabilities().get("avx512_vnni"):
        raise UsageError("--dtype int8 needs a CPU with AVX-512 VNNI", hint=_INSTEAD, code="no-device")


def reduces_weights(path: Path, device: str, dtype: str) -> bool:
    """Whether the model in a directory runs with reduced weights; in bfloat16 some run in that precision altogether.

    Raises:
        UsageError: The model cannot run with int8 weights.
        CaiError: As `model_type`.
    """
    if device != "cpu" or dtype not in ("bfloat16", "int8"):
        return False
    known = (kind := model_type(path)) in MODEL_TYPES
    if dtype == "int8" and not known:
        raise UsageError(f"{path}: no --dtype int8 for models of type {kind}", hint=_INSTEAD, code="option-conflict")
    return known


def reduce_weights(model: Any, dtype: str) -> None:
    """Replace the linear layers of a model on a CPU by layers whose weights are in `dtype`; the rest becomes float32.

    The changed model can be run, but not trained or saved.

    Args:
        model: A model for which `reduces_weights` returned True.
        dtype: "bfloat16" or "int8".
    """
    import torch

    layer_type = {"bfloat16": _bfloat16_layer, "int8": _int8_layer}[dtype]()
    with torch.no_grad():
        for name, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear:
                model.set_submodule(name, layer_type(layer))
    model.float()


def _bfloat16_layer() -> Any:
    import torch

    onednn: Any = torch.ops.mkldnn
    backend: Any = torch.backends.mkldnn
    packs = backend.is_available() and onednn._is_mkldnn_bf16_supported()

    class BFloat16Linear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().bfloat16()
            self.bias = None if linear.bias is None else linear.bias.detach().float()
            self.weight = onednn._reorder_linear_weight(weight, ROWS) if packs else weight

        def forward(self, x: "Tensor") -> "Tensor":
            if packs:
                out: Tensor = onednn._linear_pointwise(x.bfloat16(), self.weight, None, "none", [], "").float()
            else:
                out = torch.nn.functional.linear(x.bfloat16(), self.weight).float()
            return out if self.bias is None else out.add_(self.bias)

    return BFloat16Linear


def _int8_layer() -> Any:
    import torch

    onednn: Any = torch.ops.onednn

    class Int8Linear(torch.nn.Module):
        """Weights are rounded to 8 bits with a scale for each output; inputs are two 8-bit numbers with a scale for
        each row, 15 bits together. Sums of integers are exact: a row's result does not depend on the other rows."""

        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().float()
            self.scales = weight.abs().amax(1).clamp_(min=1e-30) / 127
            self.zero_points = torch.zeros(len(weight), dtype=torch.long)
            self.weight = onednn.qlinear_prepack((weight / self.scales[:, None]).round_().to(torch.int8), None)
            self.bias = None if linear.bias is None else linear.bias.detach().float()

        def forward(self, x: "Tensor") -> "Tensor":
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            parts, scales = split(flat)
            none: list[Any] = []
            products = onednn.qlinear_pointwise(
                parts, 1.0, 0, self.weight, self.scales, self.zero_points, None, 1.0, 0, torch.float32, "none", none, ""
            )
            out = join(products, scales).view(*x.shape[:-1], -1)
            return out if self.bias is None else out.add_(self.bias)

    return Int8Linear


def split(x: "Tensor") -> "tuple[Tensor, Tensor]":
    """The rows of `x` (rows, size) as 8-bit integers: x = (high + low / 254) * scale.

    Returns:
        The high parts of all rows, the low parts, and anything in rows up to `_LEAST_ROWS`; the scale of each row.
    """
    import torch

    rows, size = x.shape
    parts = torch.zeros(max(2 * rows, _LEAST_ROWS), size, dtype=torch.int8)
    if functions := library():
        scales = x.new_empty(rows)
        functions.split(address(x), address(parts), address(scales), rows, size, torch.get_num_threads())
        return parts, scales
    scales = x.abs().amax(1).clamp_(min=1e-30) / 127
    values = x / scales[:, None]
    high = values.round()
    parts[:rows], parts[rows : 2 * rows] = high, ((values - high) * _LOW).round()
    return parts, scales


def join(products: "Tensor", scales: "Tensor") -> "Tensor":
    """The products of the rows (rows, outputs) from those of their parts, and their scales."""
    import torch

    rows, size = len(scales), products.shape[1]
    high, low = products[:rows], products[rows : 2 * rows]
    if functions := library():
        functions.join(address(products), address(scales), rows, size, torch.get_num_threads())
        return high
    return high.add_(low, alpha=1 / _LOW).mul_(scales[:, None])
