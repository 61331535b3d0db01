"""The first Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv:2102.12122) as a trunk without its attention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import LayerNorm2d, resample_abs_pos_embed, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._linear import LinearTrunk
from visionattn.layers import fill_patch


@register_notrace_module  # the size of the map decides whether the embedding is resized, which fx cannot trace
class PositionedPatches(nn.Module):
    """A strided convolution, a norm and a position embedding: (B, in_dim, H, W) to (B, dim, H/s, W/s), rounded down.

    What does not fill a patch is left out, as the authors do; a map smaller than one patch is padded with zeros. The
    embedding is resized bilinearly to the map; the authors forget that at twice the training size.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the patches.
        side: Side of the map to which the embedding belongs.
        patch_size: Stride and kernel s.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, in_dim: int, dim: int, side: int, patch_size: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_dim, dim, patch_size, stride=patch_size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embedding from a truncated normal distribution of deviation 0.02."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the map."""
        x = self.norm(self.proj(fill_patch(x, self.patch_size)))
        size = [x.shape[2], x.shape[3]]
        pos_embed = resample_abs_pos_embed(self.pos_embed, size, None, 0, interpolation="bilinear", antialias=False)
        return x + pos_embed.transpose(1, 2).view(1, -1, size[0], size[1])


class PVT(LinearTrunk):
    """Position embeddings at every stage, no class token and no final norm. Arguments: `LinearTrunk`."""

    rules: ClassVar[Sequence[tuple[str, str]]] = [
        (r"^patch_embed1\.", "stem."),
        (r"^pos_embed1$", "stem.pos_embed"),
        *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
        *((rf"^pos_embed{i + 1}$", f"stages.{i}.downsample.pos_embed") for i in range(1, 4)),
        *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        (r"^head\.", "head.fc."),
    ]
    norm_eps = 1e-6
    make_stem: ClassVar[Callable[..., nn.Module]] = staticmethod(partial(PositionedPatches, patch_size=4))
    make_downsample: ClassVar[Callable[..., nn.Module]] = PositionedPatches
    make_norm: ClassVar[Callable[..., nn.Module]] = nn.Identity
