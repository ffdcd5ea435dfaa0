"""Speeds up float32 matrix products on x86 CPUs by storing weights in the layout that is fastest there.

torch multiplies by the transposed weights of a layer with MKL. On CPUs that are not Intel's, MKL reaches half the speed
of oneDNN with its own layout, which torch's compiler uses too when it freezes a model. On Intel's, MKL is the fastest
once the weights are stored transposed: a quarter faster than either for the rows of a decoding step.
"""

from collections.abc import Hashable
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # oneDNN's layout is optimised for about this many rows; it works for any number


def pack_linears(model: Any) -> dict[str, Any]:
    """Replace the linear layers of a float32 model on an x86 CPU by layers with a faster weight layout.

    Other models stay as they are. The changed model can be run, but not trained or saved.

    Returns:
        The replaced layers by name.
    """
    import platform

    import torch

    onednn: Any = torch.backends.mkldnn
    mkl: Any = torch.backends.mkl
    ready = onednn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not ready or model.device.type != "cpu" or model.dtype != torch.float32:
        return {}

    class TransposedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = linear.weight.detach().t().contiguous()
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: "Tensor") -> "Tensor":
            return x @ self.weight if self.bias is None else x @ self.weight + self.bias

    class PackedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: "Tensor") -> "Tensor":
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out

    layer_type = TransposedLinear if _is_intel() and mkl.is_available() else PackedLinear
    linears = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and not _reads_weight(model.get_submodule(name.rpartition(".")[0]), name)
    }
    with torch.no_grad():
        for name, layer in linears.items():
            model.set_submodule(name, layer_type(layer))
    return linears


def _reads_weight(parent: Any, name: str) -> bool:
    """Whether a module uses the weight of a layer itself instead of calling the layer, as Mamba does."""
    return f"self.{name.rpartition('.')[2]}.weight" in _source(cast(Hashable, type(parent)))


@cache
def _source(module: Hashable) -> str:
    try:
        return getsource(cast(type, module))
    except (OSError, TypeError):  # made in a shell
        return ""


def _is_intel() -> bool:
    """Whether this is a CPU of Intel; False where the system does not say."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
