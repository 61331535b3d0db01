"""Isotropic NAT and DiNAT, and the ViT with relative biases that their authors compare them with.

Dilated Neighborhood Attention Transformer (Hassani and Shi, arXiv:2209.15001), appendix. One resolution of 16 px a
position and twelve equal blocks; here they are four stages of three, so that features and layer decay work as in every
other backbone. Checked against SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._neighborhood import Dilations, NeighborhoodPyramid, PatchStem
from visionattn.checkpoint import translate
from visionattn.layers import NeighborhoodAttention
from visionattn.registry import build, cfg

BLOCKS_A_STAGE = 3
# Every other of the twelve blocks; a stage has three, so that every other stage begins with a dilated one.
DILATIONS = ((1, 2), (2, 1), (1, 2), (2, 1))


@register_notrace_module  # the size of the map decides whether the bias is resized, which fx cannot trace
class GlobalAttention(NeighborhoodAttention):
    """Attention of every position to the whole map, with a relative bias: a window as large as the map.

    The bias belongs to maps of `kernel_size` squared; for others it is resized bicubically.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        height, width = x.shape[1], x.shape[2]
        bias = self.rpb
        # At the bias's own size a resize changes nothing, but a trace without one would take no other.
        any_size = False
        if not torch.jit.is_scripting():
            any_size = torch.jit.is_tracing()
        if any_size or height != self.kernel_size or width != self.kernel_size:
            size = [2 * height - 1, 2 * width - 1]
            bias = F.interpolate(bias.unsqueeze(0), size, mode="bicubic", align_corners=False).squeeze(0)
        return self.proj_drop(self.proj(self.attend(x, bias, [height, width], [1, 1])))


class NATIsotropic(NeighborhoodPyramid):
    """Isotropic (dilated) neighborhood attention transformer. Arguments: `NeighborhoodPyramid`."""

    make_stem = staticmethod(partial(PatchStem, patch_size=16))
    make_downsample = nn.Identity
    reductions = (16, 16, 16, 16)
    presets: ClassVar[Mapping[str, Dilations]] = {"classification": DILATIONS}


class ViTRPB(NATIsotropic):
    """Vision transformer with relative biases on the isotropic trunk. Arguments: `NeighborhoodPyramid`.

    `kernel_size` is the side of the map at the training size, `dilations` has no effect.
    """

    make_attention = GlobalAttention


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours and drop the index tables they keep; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [
        (r"^patch_embed\.", "stem."),
        *((rf"^layers\.{i}\.", f"stages.{i // BLOCKS_A_STAGE}.blocks.{i % BLOCKS_A_STAGE}.") for i in range(12)),
        (r"^head\.", "head.fc."),
    ]
    return translate(state_dict, model, rules, drop=r"\.relative_position_index$")


def _cfg(name: str = "", **fields) -> PretrainedCfg:
    return cfg(
        url=name and f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{name}_in1k_224.pth",
        source="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        paper="2209.15001",
        license="mit",
        **({"pool_size": (14, 14)} | fields),
    )


_TEST = {"input_size": (3, 160, 160), "pool_size": (10, 10)}

default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small", top1=80.0, params=21999736, gmacs=4.3),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base", top1=81.6, params=86465800, gmacs=16.9),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small", top1=80.8, params=21999736, gmacs=4.3),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base", top1=82.1, params=86465800, gmacs=16.9),
        "vitrpb_small.in1k": _cfg("vitrpb_small", top1=81.2, params=22080376, gmacs=4.6),
        "vitrpb_base.in1k": _cfg("vitrpb_base", top1=82.5, gmacs=17.5),
        "test_nat_isotropic.untrained": _cfg(**_TEST),
        "test_isotropic_vitrpb.untrained": _cfg(**_TEST),
    }
)


def _same(dim: int, num_heads: int, depth: int = BLOCKS_A_STAGE) -> dict:
    """Four equal stages."""
    return {"dims": (dim,) * 4, "depths": (depth,) * 4, "num_heads": (num_heads,) * 4}


_SMALL = _same(384, 12) | {"drop_path_rate": 0.1}
_BASE = _same(768, 24) | {"drop_path_rate": 0.4}
_TINIEST = _same(32, 2, depth=1) | {"mlp_ratio": 2.0}


def _create(variant: str, pretrained: bool, kwargs: dict, family: type[NATIsotropic] = NATIsotropic, **settings):
    return build(family, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT-Small."""
    return _create("nat_isotropic_small", pretrained, kwargs, **_SMALL)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT-Base."""
    return _create("nat_isotropic_base", pretrained, kwargs, **_BASE)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT-Small."""
    return _create("dinat_isotropic_small", pretrained, kwargs, **_SMALL, dilations=DILATIONS)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT-Base."""
    return _create("dinat_isotropic_base", pretrained, kwargs, **_BASE, dilations=DILATIONS)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> ViTRPB:
    """ViT-Small with relative biases."""
    return _create("vitrpb_small", pretrained, kwargs, ViTRPB, **_SMALL, kernel_size=14)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> ViTRPB:
    """ViT-Base with relative biases."""
    return _create("vitrpb_base", pretrained, kwargs, ViTRPB, **_BASE, kernel_size=14)


@register_model
def test_nat_isotropic(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """An isotropic NAT small enough to test everything in seconds."""
    return _create("test_nat_isotropic", pretrained, kwargs, **_TINIEST)


@register_model
def test_isotropic_vitrpb(pretrained: bool = False, **kwargs) -> ViTRPB:
    """A ViT with relative biases small enough to test everything in seconds."""
    return _create("test_isotropic_vitrpb", pretrained, kwargs, ViTRPB, **_TINIEST, kernel_size=10)
