"""Neighborhood attention as a module (NAT, arXiv:2204.07143; dilation: DiNAT, arXiv:2209.15001)."""

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visionattn.layers.conv import shortfall, zero_pad
from visionattn_kernels import neighborhood_attention


@register_notrace_module  # the size of the map decides whether it is padded, which fx cannot trace
class NeighborhoodAttention(nn.Module):
    """Multi-head self-attention of every position to the window around it, with a trainable relative bias.

    A map smaller than `kernel_size * dilation` is padded with zeros at the bottom and on the right before the
    projection, so that the padding owns keys and values and is attended to. NATTEN did so up to 0.15, and the published
    NAT and DiNAT results were made with it.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        kernel_size: Window K, the same along both axes.
        dilation: Step between the keys of a window. No weight depends on it, so it may be set later.
        qkv_bias: Whether the projection to query, key and value has a bias.
        proj_drop: Dropout after the output projection.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the relative bias from a truncated normal distribution of deviation 0.02."""
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        height, width = x.shape[1], x.shape[2]
        extent = self.kernel_size * self.dilation
        x = zero_pad(x, [0, 0, 0, shortfall(width, extent), 0, shortfall(height, extent)])
        x = self.attend(x, self.rpb, [self.kernel_size, self.kernel_size], [self.dilation, self.dilation])
        return self.proj_drop(self.proj(x[:, :height, :width]))

    def attend(self, x: Tensor, bias: Tensor, kernel_size: list[int], dilation: list[int]) -> Tensor:
        """Attention of a map that holds the window, (B, H, W, C), without the output projection."""
        batch, height, width, dim = x.shape
        # Cut along the channels, the three gradients join in one copy; as slices of a stack they would be copied twice.
        query, key, value = [
            part.view(batch, height, width, self.num_heads, dim // self.num_heads).permute(0, 3, 1, 2, 4)
            for part in self.qkv(x).chunk(3, dim=-1)
        ]
        bias = bias.to(query.dtype)
        if torch.jit.is_scripting():
            out, _ = torch.ops.visionattn.neighborhood_attention(
                query, key, value, bias, kernel_size, [1, 1], dilation, self.scale
            )
        else:
            out = neighborhood_attention(query, key, value, kernel_size, dilation=dilation, bias=bias, scale=self.scale)
        return out.permute(0, 2, 3, 1, 4).reshape(batch, height, width, dim)

    def extra_repr(self) -> str:
        """Settings that no submodule shows."""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
