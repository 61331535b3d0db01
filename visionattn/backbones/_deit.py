"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877) as a trunk: patches of 16 pixels and a class token.

Its twelve blocks are four stages of three, so that features and layer decay work as in every other backbone.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Attention, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionattn.backbones._linear import LinearTrunk
from visionattn.layers import AttentionBlock, pad_to_multiple

BLOCKS_A_STAGE = 3


@register_notrace_module  # the size of the map decides whether the embedding is resized, which fx cannot trace
class TokenStem(nn.Module):
    """Patches behind a class token, positioned: (B, in_chans, H, W) to tokens (B, 1 + H/16 W/16, dim).

    The image is padded with zeros to whole patches. The embedding is resized bicubically to the map.
    """

    def __init__(self, in_chans: int, dim: int, side: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 16, stride=16, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.token_embed = nn.Parameter(torch.empty(1, 1 + side * side, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw class token and embedding from a truncated normal distribution of deviation 0.02."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.token_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Image to tokens."""
        x = self.proj(pad_to_multiple(x, 16))
        pos_embed = resample_abs_pos_embed(self.token_embed, [x.shape[2], x.shape[3]], antialias=False)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return tokens + pos_embed


class TokenAttention(Attention):
    """timm's softmax attention, on tokens of a map whose size it has no use for."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, C) to the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))


class TokenBlock(AttentionBlock):
    """The residual block on a class token and the tokens of a map of `height` and `width`."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, 1 + H W, C) to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), height, width)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TokenStage(nn.Module):
    """Blocks on tokens."""

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.dim = dim
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Run the blocks."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return x


class DeiT(LinearTrunk):
    """A class token, which the head sees, and one resolution. Arguments: `LinearTrunk`.

    `forward_features` gives the tokens as a map of one column, (B, C, 1 + H W, 1), the class token first; of a model
    whose last stages are pruned, and whose class token nothing sees, the patches as a map (B, C, H, W).
    """

    rules: ClassVar[Sequence[tuple[str, str]]] = [
        (r"^cls_token$", "stem.cls_token"),
        (r"^pos_embed$", "stem.token_embed"),
        (r"^patch_embed\.", "stem."),
        *((rf"^blocks\.{i}\.", f"stages.{i // BLOCKS_A_STAGE}.blocks.{i % BLOCKS_A_STAGE}.") for i in range(12)),
        (r"^head\.", "head.fc."),
    ]
    reductions = (16, 16, 16, 16)
    # Maps of tokens come from `forward_intermediates`, not from the stages alone.
    feature_cls = "getter"
    norm_eps = 1e-6
    make_stem = TokenStem
    make_downsample: ClassVar[Callable[..., nn.Module]] = nn.Identity
    make_block: ClassVar[Callable[..., nn.Module]] = TokenBlock
    make_stage: ClassVar[Callable[..., nn.Module]] = TokenStage
    make_norm: ClassVar[Callable[..., nn.Module]] = nn.LayerNorm

    def __init__(self, *, dims: int, depth: int = BLOCKS_A_STAGE, num_heads: int, **kwargs):
        super().__init__(dims=(dims,) * 4, depths=(depth,) * 4, num_heads=(num_heads,) * 4, **kwargs)
        # TorchScript reads a Sequential's own forward, which passes no size.
        self.stages = nn.ModuleList(self.stages)
        self.gives_class_token = True

    @staticmethod
    def make_softmax(stage: int, block: int, dim: int, num_heads: int, img_size: int, **kwargs) -> nn.Module:
        """Attention of all tokens to all."""
        return TokenAttention(dim, num_heads, qkv_bias=True, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Class token and position embedding, which the authors train without weight decay."""
        return {"stem.cls_token", "stem.token_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the normed tokens (B, C, 1 + H W, 1), or the patches alone once pruned."""
        height, width = -(-x.shape[2] // 16), -(-x.shape[3] // 16)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, height, width)
        x = self.norm(x).transpose(1, 2)
        if self.gives_class_token:
            return x.unsqueeze(3)
        return x[:, :, 1:].unflatten(2, (height, width))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages in `indices` do not need. Arguments and result: `Pyramid`."""
        stages = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.gives_class_token = self.gives_class_token and len(self.stages) == stages
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token of what `forward_features` gives; with `pre_logits` only pick it."""
        if self.head.global_pool.pool_type == "avg":
            x = x[:, :, :1]
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the stages and keep their patch tokens as maps (B, C, H, W). Arguments: `Pyramid`."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        height, width = -(-x.shape[2] // 16), -(-x.shape[3] // 16)
        kept, last = [], len(self.stages) - 1
        take, deepest = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: deepest + 1] if stop_early else self.stages):
            x = stage(x, height, width)
            if index in take:
                patches = (self.norm(x) if norm and index == last else x)[:, 1:]
                kept.append(patches.transpose(1, 2).unflatten(2, (height, width)))
        if intermediates_only:
            return kept
        x = self.norm(x) if not stop_early or deepest == last else x
        return x.transpose(1, 2).unsqueeze(3), kept
