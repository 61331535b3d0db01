"""CSWin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652) as a trunk, and attention in its stripes."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._linear import LinearTrunk
from visionattn.layers import DepthwiseConv, pad_to_multiple, zero_pad

TINY = {"dims": (64, 128, 256, 512), "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16), "linear_depths": (2, 4, 0, 0)}
SMALL = TINY | {"depths": (3, 6, 29, 2), "linear_depths": (3, 6, 0, 0)}
BASE = SMALL | {"dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}


@register_notrace_module  # the size of the map decides the padding, which fx cannot trace
class CrossWindowAttention(nn.Module):
    """Softmax attention within stripes, half of the channels within upright ones and half within level ones.

    The position enters through a depthwise convolution of the values inside each stripe. A map that the stripes do not
    divide is padded with zeros behind the projection, as in CSWin's own dense models.

    Args:
        dim: Channels C.
        num_heads: Heads; even, unless `stripe` is None.
        stripe: Width of the stripes; None for one window over the whole map.
        proj_drop: Dropout after the output projection.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int | None, proj_drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        branches = 1 if stripe is None else 2
        self.stripe = 0 if stripe is None else stripe
        self.num_heads = num_heads // branches
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.attns = nn.ModuleList(DepthwiseConv(dim // branches, 3, **dd) for _ in range(branches))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        qkv, stripe = self.qkv(x), self.stripe
        if stripe > 0:
            qkv = zero_pad(qkv, [0, 0, 0, -width % stripe, 0, -height % stripe])
        rows, columns = qkv.shape[1], qkv.shape[2]
        qkv = qkv.view(batch, rows, columns, 3, dim)
        # Cut once, the gradients of both halves join in one copy.
        halves = [qkv] if stripe == 0 else qkv.chunk(2, -1)
        parts = []
        for i, lepe in enumerate(self.attns):
            sides = [rows, columns] if stripe == 0 else ([rows, stripe] if i == 0 else [stripe, columns])
            parts.append(self._branch(halves[i], lepe.weight, lepe.bias, sides))
        out = parts[0] if stripe == 0 else torch.cat(parts, -1)
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def _branch(self, qkv: Tensor, weight: Tensor, bias: Tensor | None, sides: list[int]) -> Tensor:
        """Attention of (B, H, W, 3, C) within windows of `sides`, (B, H, W, C)."""
        batch, height, width, _, dim = qkv.shape
        down, right = height // sides[0], width // sides[1]
        windows = qkv.view(batch, down, sides[0], right, sides[1], 3, dim).permute(5, 0, 1, 3, 2, 4, 6)
        windows = windows.reshape(3, batch * down * right, sides[0] * sides[1], dim)
        parts = windows.unbind(0)
        query, key, value = [x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in parts]
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).reshape(-1, sides[0], sides[1], dim)
        value = parts[2].view(-1, sides[0], sides[1], dim).permute(0, 3, 1, 2)
        out = out + F.conv2d(value, weight, bias, padding=1, groups=dim).permute(0, 2, 3, 1)
        out = out.view(batch, down, right, sides[0], sides[1], dim).transpose(2, 3)
        return out.reshape(batch, height, width, dim)


@register_notrace_module  # the size of the map decides the padding, which fx cannot trace
class ConvNorm(nn.Module):
    """A strided convolution and a norm: (B, in_dim, H, W) to (B, dim, H/s, W/s), the map padded to whole steps s."""

    def __init__(self, in_dim: int, dim: int, side: int, stride: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = stride
        self.proj = nn.Conv2d(in_dim, dim, 2 * stride - 1, stride=stride, padding=stride // 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the map."""
        return self.norm(self.proj(pad_to_multiple(x, self.stride)))


class CSWin(LinearTrunk):
    """The family's attention over the whole map, and stripes of img_size / 32 in the other blocks; the last stage's
    softmax attention sees the whole map. Arguments: `LinearTrunk`.
    """

    rules: ClassVar[Sequence[tuple[str, str]]] = [
        (r"^stage1_conv_embed\.0\.", "stem.proj."),
        (r"^stage1_conv_embed\.2\.", "stem.norm."),
        *((rf"^merge{i}\.conv\.", f"stages.{i}.downsample.proj.") for i in range(1, 4)),
        *((rf"^merge{i}\.norm\.", f"stages.{i}.downsample.norm.") for i in range(1, 4)),
        *((rf"^stage{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        (r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.attn.\2."),
        (r"^head\.", "head.fc."),
    ]
    make_stem = staticmethod(partial(ConvNorm, stride=4))
    make_downsample = ConvNorm

    @staticmethod
    def make_softmax(stage: int, block: int, dim: int, num_heads: int, img_size: int, **kwargs) -> nn.Module:
        """Stripes, or one window in the last stage."""
        return CrossWindowAttention(dim, num_heads, None if stage == 3 else img_size // 32, **kwargs)
