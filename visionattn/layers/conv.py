"""Convolutions on the layout of blocks."""

from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel on its own that keeps the size of the map, on (B, H, W, C).

    Args:
        dim: Channels C.
        kernel_size: Side of the kernel, odd.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)
