"""Speeds up matrix products on x86 CPUs by storing weights in oneDNN's own layout.

torch uses MKL for float32 products. On CPUs that are not Intel's, MKL reaches half the speed of oneDNN, and less for
the few rows of a decoding step. torch's compiler makes the same calls when it freezes a model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # the layout is optimised for about this many rows; it works for any number


def pack_linears(model: Any) -> dict[str, Any]:
    """Replace the linear layers of a float32 model on an x86 CPU by layers with oneDNN's weight layout.

    Other models stay as they are. The changed model can be run, but not trained or saved.

    Returns:
        The replaced layers by name.
    """
    import platform

    import torch

    onednn: Any = torch.backends.mkldnn
    ready = onednn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not ready or model.device.type != "cpu" or model.dtype != torch.float32:
        return {}

    class PackedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: "Tensor") -> "Tensor":
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out

    linears = {name: layer for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    with torch.no_grad():
        for name, layer in linears.items():
            model.set_submodule(name, PackedLinear(layer))
    return linears
