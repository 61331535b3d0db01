"""What InLine's models rest on."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.layers import GroupedLinear


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_grouped_linear_is_the_convolution_of_one_sample(batch: int) -> None:
    """Result and gradients equal torch's grouped convolution, and the parameters have its names and shapes."""
    torch.manual_seed(0)
    layer = GroupedLinear(12, 20, 4, dtype=torch.float64)
    x = torch.randn(batch, 12, dtype=torch.float64, requires_grad=True)
    wanted = F.conv1d(x.unsqueeze(2), layer.weight, layer.bias, groups=4).squeeze(2)
    result = layer(x)
    torch.testing.assert_close(result, wanted)
    direction = torch.randn_like(wanted)
    inputs = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(result, inputs, direction), torch.autograd.grad(wanted, inputs, direction)
    )
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (20, 3, 1), "bias": (20,)}
