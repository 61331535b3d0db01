"""DaViT: blocks that attend within windows of positions take turns with blocks that attend from channel to channel.

DaViT: Dual Attention Vision Transformers (Ding et al., ECCV 2022, arXiv:2204.03645). Checked against dingmyu/davit at
fc79470. The computation, and so its speed, memory and export, is timm's; README.md has it measured. Ours adds the
authors' stochastic depth, which grows from block to block where timm's grows from pair to pair, checkpoints of the
authors, of their detectors too, that load whole or are refused, and `init_weights`. Norms of the features, which the
authors' detectors have, are `out_norm` of `visionattn.openmmlab`. A map that the windows do not divide is padded with
zeros behind the norm, so that padding is attended to, as the authors do.
"""

from collections.abc import Mapping

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.davit import DaVit
from torch import Tensor, nn

from visionattn.checkpoint import translate, unwrap
from visionattn.registry import build, cfg


class DaViT(DaVit):
    """timm's DaViT with the authors' stochastic depth.

    Args:
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first, a spatial and a
            channel block counting as two.
        **kwargs: As for timm's `DaVit`. No weight depends on `window_size`.
    """

    def __init__(self, drop_path_rate: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        blocks = [block for stage in self.stages for pair in stage.blocks for block in pair]
        for block, rate in zip(blocks, calculate_drop_path_rates(drop_path_rate, len(blocks)), strict=True):
            block.drop_path1 = DropPath(rate) if rate else nn.Identity()
            block.drop_path2 = DropPath(rate) if rate else nn.Identity()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew: linear layers from a truncated normal of deviation 0.02, others by their own rule."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(self._init_weights)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' and mmpretrain's names to ours, which are timm's; checkpoints in ours pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    names = unwrap(state_dict)
    # In a classifier of mmpretrain the norm of the last features is the head's.
    last = any(".spatial_block." in name for name in names) and any(name.startswith("head.fc.") for name in names)
    rules = [
        # mmpretrain's names first become the authors'.
        (r"^patch_embed\.", "patch_embeds.0."),
        *((rf"^stages\.{i}\.downsample\.", f"patch_embeds.{i + 1}.") for i in range(3)),
        (r"^(patch_embeds\.\d)\.projection\.", r"\1.proj."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.spatial_block\.", r"main_blocks.\1.\2.0."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.channel_block\.", r"main_blocks.\1.\2.1."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^head\.fc\.", "head."),
        (r"^norm3\.", "norms."),
        (r"^(patch_embeds\.\d)\.proj\.", r"\1.conv."),
        (r"^patch_embeds\.0\.", "stem."),
        (r"^patch_embeds\.(\d)\.", r"stages.\1.downsample."),
        (r"^main_blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"^head\.", "head.fc."),
        (r"^norms\.", "head.norm."),
    ]
    # Detectors and segmenters norm the features with norms of their own.
    return translate(names, model, rules, drop=r"^norm[0-2]\." if last else r"^norm\d\.")


def _cfg(**fields) -> PretrainedCfg:
    return cfg(
        source="https://github.com/dingmyu/davit",
        paper="2204.03645",
        # timm states Apache 2.0 for the weights that it hosts; the authors' code is under MIT.
        **({"license": "apache-2.0" if "hf_hub_id" in fields else "mit", "first_conv": "stem.conv"} | fields),
    )


_PAGE = "https://github.com/dingmyu/davit"

# The authors evaluate with a crop of 0.9; timm's configuration of the same weights says 0.95.
default_cfgs = generate_default_cfgs(
    {
        "davit_tiny_va.msft_in1k": _cfg(
            hf_hub_id="timm/davit_tiny.msft_in1k", top1=82.8, params=28360168, gmacs=4.5, crop_pct=0.9
        ),
        "davit_small_va.msft_in1k": _cfg(
            hf_hub_id="timm/davit_small.msft_in1k", top1=84.2, params=49745896, gmacs=8.8, crop_pct=0.9
        ),
        "davit_base_va.msft_in1k": _cfg(
            hf_hub_id="timm/davit_base.msft_in1k", top1=84.6, params=87954408, gmacs=15.5, crop_pct=0.9
        ),
        # The authors' files, on shares that this page links.
        "davit_tiny_va.in1k": _cfg(page=_PAGE, top1=82.8, params=28360168, gmacs=4.5, crop_pct=0.9),
        "davit_small_va.in1k": _cfg(page=_PAGE, top1=84.2, params=49745896, gmacs=8.8, crop_pct=0.9),
        "davit_base_va.in1k": _cfg(page=_PAGE, top1=84.6, params=87954408, gmacs=15.5, crop_pct=0.9),
        "davit_large_va.untrained": _cfg(params=196811752),
        "davit_huge_va.untrained": _cfg(params=348922856),
        "davit_giant_va.untrained": _cfg(params=1406470120),
        "test_davit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> DaViT:
    return build(DaViT, variant, pretrained, checkpoint_filter_fn, **({"drop_path_rate": 0.1} | settings | kwargs))


@register_model
def davit_tiny_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Tiny."""
    return _create("davit_tiny_va", pretrained, kwargs)


@register_model
def davit_small_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Small."""
    return _create("davit_small_va", pretrained, kwargs, depths=(1, 1, 9, 1))


@register_model
def davit_base_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Base."""
    settings = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
    return _create("davit_base_va", pretrained, kwargs, **settings)


@register_model
def davit_large_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Large; the authors' constructor for images of 384 has `window_size` 12. No weights are published."""
    settings = {"depths": (1, 1, 9, 1), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
    return _create("davit_large_va", pretrained, kwargs, **settings)


@register_model
def davit_huge_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Huge as timm defines it. No weights are published."""
    settings = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
    return _create("davit_huge_va", pretrained, kwargs, **settings)


@register_model
def davit_giant_va(pretrained: bool = False, **kwargs) -> DaViT:
    """DaViT-Giant as timm defines it. No weights are published."""
    settings = {"depths": (1, 1, 12, 3), "embed_dims": (384, 768, 1536, 3072), "num_heads": (12, 24, 48, 96)}
    return _create("davit_giant_va", pretrained, kwargs, **settings)


@register_model
def test_davit(pretrained: bool = False, **kwargs) -> DaViT:
    """A DaViT small enough to test everything in seconds."""
    settings = {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "window_size": 4}
    return _create("test_davit", pretrained, kwargs, **settings)
