"""What the families on neighborhood attention share: stages of blocks whose dilations may be chosen per task."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import ClassVar

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.layers import AttentionBlock, NeighborhoodAttention, pad_to_multiple

# One dilation for all blocks, the name of a preset, or a pattern per stage that repeats over its blocks.
Dilations = int | str | Sequence[int | Sequence[int]]


class PatchStem(nn.Module):
    """One convolution of `patch_size` p and a norm: (B, in_chans, H, W) to (B, dim, H/p, W/p).

    The image is padded with zeros at the bottom and on the right to whole patches.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image to patches."""
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)))


class NeighborhoodPyramid(Pyramid):
    """Stages of neighborhood attention blocks. A family sets the class attributes.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        kernel_size: Window K.
        dilations: Steps between the keys of a window: one for all blocks, a pattern per stage that repeats over its
            blocks, or the name of one of the family's `presets`. No weight depends on them.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        qkv_bias: Whether the projections to query, key and value have a bias.
        layer_scale: Initial value of the residual paths' factors, None for no such factors.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in attention's output and in the MLPs.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `dilations` names no preset or does not fit the stages.
    """

    make_stem: ClassVar[Callable[..., nn.Module]]
    make_downsample: ClassVar[Callable[..., nn.Module]]
    make_attention: ClassVar[Callable[..., nn.Module]] = NeighborhoodAttention
    reductions: ClassVar[Sequence[int]] = (4, 8, 16, 32)
    presets: ClassVar[Mapping[str, Dilations]] = {}

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        kernel_size: int = 7,
        dilations: Dilations = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = [
                AttentionBlock(
                    dim,
                    self.make_attention(dim, heads, kernel_size, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    layer_scale=layer_scale,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            downsample = self.make_downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(dim, downsample, blocks))
        super().__init__(
            self.make_stem(in_chans, dims[0], **dd),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5, **dd),
            self.reductions,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.set_dilations(dilations)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative biases, which the authors train without weight decay."""
        return {"*.rpb"}

    @torch.jit.ignore
    def set_dilations(self, dilations: Dilations) -> None:
        """Choose the dilations anew, as at construction: one model serves classification and dense tasks.

        Raises:
            ValueError: `dilations` names no preset or does not fit the stages.
        """
        if isinstance(dilations, str):
            if dilations not in self.presets:
                raise ValueError(f"dilations must be one of {sorted(self.presets)} or numbers, got {dilations!r}")
            dilations = self.presets[dilations]
        patterns = [dilations] * len(self.stages) if isinstance(dilations, int) else list(dilations)
        if len(patterns) != len(self.stages):
            raise ValueError(f"dilations must have a pattern for each of {len(self.stages)} stages, got {dilations!r}")
        for stage, pattern in zip(self.stages, patterns, strict=True):
            steps = (pattern,) if isinstance(pattern, int) else tuple(pattern)
            if not steps or any(not isinstance(step, int) or step < 1 for step in steps):
                raise ValueError(f"dilations must be whole numbers of at least 1, got {pattern!r} in {dilations!r}")
            for block, step in zip(stage.blocks, islice(cycle(steps), len(stage.blocks)), strict=True):
                block.attn.dilation = step
