"""Matrix products on a CPU at the speed it has: the weights laid out once as oneDNN wants them.

torch's own product in float32 is MKL's, which on CPUs not made by Intel reaches half of what oneDNN does and less for
the few rows of a decoding step. torch's compiler makes the same calls when it freezes a model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # the layout is chosen for about this many; it serves any number


def pack_linears(model: Any) -> None:
    """Give every float32 linear layer of `model`, which is on an x86 CPU, its weight in oneDNN's own layout, in place
    of the plain one. The model can only be run then, not trained or saved."""
    import platform

    import torch

    onednn: Any = torch.backends.mkldnn
    ready = onednn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not ready or model.device.type != "cpu" or model.dtype != torch.float32:
        return

    class PackedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: "Tensor") -> "Tensor":
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out

    with torch.no_grad():
        for name, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear:
                model.set_submodule(name, PackedLinear(layer))
