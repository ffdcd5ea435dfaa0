"""The layouts of weights on x86 CPUs give the products of the layers that they replace."""

import pytest
import torch

from cai_cli.engines.local import onednn


class Layers(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result


@pytest.mark.parametrize("intel", [True, False])
def test_layers_in_the_layout_of_each_processor_give_the_same_products(
    intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_is_intel", lambda: intel)
    model, x = Layers(), torch.randn(2, 5, 24)
    with torch.inference_mode():
        plain = model(x)
        onednn.pack_linears(model)
        assert torch.allclose(model(x), plain, atol=1e-5)
        assert torch.allclose(model(x[0]), plain[0], atol=1e-5)
