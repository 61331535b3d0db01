"""Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030) as a trunk, and attention in its shifted windows."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.models import register_notrace_module
from timm.models.swin_transformer import PatchMerging, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from visionattn.backbones._linear import LinearTrunk
from visionattn.backbones._neighborhood import PatchStem
from visionattn.layers import zero_pad

TINY = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "linear_depths": (2, 2, 6, 0)}
SMALL = TINY | {"depths": (2, 2, 18, 2), "linear_depths": (2, 2, 0, 0)}
BASE = SMALL | {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "linear_depths": (2, 2, 2, 0)}
# Tables that are computed, and the norms of the features that the authors' detectors and segmenters have.
DROP = r"\.(relative_position_index|attn_mask)$|^norm\d\."


@register_notrace_module  # the size of the map decides the padding and the shift, which fx cannot trace
class ShiftedWindowAttention(WindowAttention):
    """Softmax attention within windows that may be shifted by half a window, with relative biases.

    A map that the windows do not divide is padded with zeros at the bottom and on the right; padding is attended to.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        window_size: Side of the windows.
        shift: Steps by which the windows are shifted.
        proj_drop: Dropout after the output projection.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shift: int, proj_drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__(dim, num_heads, window_size=window_size, proj_drop=proj_drop, device=device, dtype=dtype)
        self.shift = shift
        # The authors' classifiers do not shift a map that one window covers, their dense models do.
        self.always_shift = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        height, width, window = x.shape[1], x.shape[2], self.window_size[0]
        x = zero_pad(x, [0, 0, 0, -width % window, 0, -height % window])
        padded_height, padded_width = x.shape[1], x.shape[2]
        shift = self.shift if self.always_shift or min(height, width) > window else 0
        shifted = shift > 0
        mask: Tensor | None = None
        if not torch.jit.is_scripting():  # noqa: SIM102  joined by `and`, the second would be compiled
            if torch.jit.is_tracing() and not self.always_shift:
                # A trace cannot choose: it always shifts, be it by nothing.
                shift, shifted = self.shift * ((height > window) & (width > window)), self.shift > 0
        if shifted:
            x = torch.roll(x, [-shift, -shift], [1, 2])
            mask = self._mask(padded_height, padded_width, shift, x)
        windows = window_partition(x, self.window_size).flatten(1, 2)
        out = self._attend(windows, mask).view(-1, window, window, x.shape[3])
        out = window_reverse(out, self.window_size, padded_height, padded_width)
        if shifted:
            out = torch.roll(out, [shift, shift], [1, 2])
        return out[:, :height, :width]

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (B * windows, N, C) to the same shape; `mask` (windows, N, N) is added to the scores."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * self.scale) @ key.transpose(-2, -1) + self._get_rel_pos_bias()
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], self.num_heads, tokens, tokens) + mask.unsqueeze(1)
            scores = scores.view(batch, self.num_heads, tokens, tokens)
        out = scores.softmax(-1).to(value.dtype) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))

    def _mask(self, height: int, width: int, shift: int, like: Tensor) -> Tensor:
        """What keeps tokens apart that only the shift brought into one window: (windows, N, N) of 0 and -100."""
        window = self.window_size[0]
        rows = torch.arange(height, device=like.device)
        columns = torch.arange(width, device=like.device)
        rows = (rows >= height - window).long() + (rows >= height - shift).long()
        columns = (columns >= width - window).long() + (columns >= width - shift).long()
        regions = (3 * rows.unsqueeze(1) + columns).view(1, height, width, 1)
        regions = window_partition(regions, self.window_size).view(-1, window * window)
        return (regions.unsqueeze(1) != regions.unsqueeze(2)).to(like.dtype) * -100.0


class Merging(nn.Module):
    """Swin's patch merging on maps: (B, in_dim, H, W) to (B, dim, H/2, W/2), odd sides padded with zeros."""

    def __init__(self, in_dim: int, dim: int, side: int, device=None, dtype=None):
        super().__init__()
        self.merging = PatchMerging(in_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.merging(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Swin(LinearTrunk):
    """The family's attention over the whole map, and shifted windows of img_size / 32, at least 7, in other blocks.

    Arguments: `LinearTrunk`.
    """

    rules: ClassVar[Sequence[tuple[str, str]]] = [
        (r"^patch_embed\.", "stem."),
        # A stage begins with the merging that ends the authors' previous layer.
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.merging.") for i in range(3)),
        (r"^layers\.", "stages."),
        (r"^head\.", "head.fc."),
    ]
    make_downsample = Merging

    @staticmethod
    def make_stem(in_chans: int, dim: int, side: int, **dd) -> PatchStem:
        """Patches of four pixels, the image padded to whole ones."""
        return PatchStem(in_chans, dim, patch_size=4, **dd)

    def make_softmax(self, stage: int, block: int, dim: int, num_heads: int, img_size: int, **kwargs) -> nn.Module:
        """Every other block of a stage is shifted, counted over all its blocks."""
        wanted = max(7, img_size // 32)
        window = min(wanted, img_size // self.reductions[stage])
        return ShiftedWindowAttention(dim, num_heads, window, wanted // 2 if block % 2 else 0, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative biases, which the authors train without weight decay."""
        return {"*.relative_position_bias_table"}
