"""NAT and DiNAT: hierarchical transformers on neighborhood attention.

Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv:2204.07143) and Dilated Neighborhood Attention
Transformer (Hassani and Shi, arXiv:2209.15001). DiNAT is NAT with dilated windows in every other block; no weight
depends on the dilation. Checked against SHI-Labs/Neighborhood-Attention-Transformer at d334f5b, from which the layout
differs: maps are (B, C, H, W) between stages, and a stage begins with the downsample that ends the previous one there.
"""

from collections.abc import Mapping
from typing import ClassVar

from timm.layers import LayerNorm2d
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._neighborhood import Dilations, NeighborhoodPyramid
from visionattn.checkpoint import translate
from visionattn.registry import build, cfg

# Odd blocks reach as far as the stage's map at 224 px allows: 56, 28, 14, 7 divided by K = 7.
DINAT_DILATIONS = ((1, 8), (1, 4), (1, 2), 1)


# From the names of transformers, which projects to query, key and value apart, to the authors'.
TRANSFORMERS = (
    (r"^(di)?nat\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(di)?nat\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^(di)?nat\.encoder\.(levels\.\d)\.layers\.", r"\2.blocks."),
    (r"^(di)?nat\.encoder\.", ""),
    (r"^(di)?nat\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    *((rf"\.attention\.self\.{x}\.(\w+)$", rf".attn.qkv.\1#{i}") for i, x in enumerate(("query", "key", "value"))),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


class ConvStem(nn.Module):
    """Two strided convolutions and a norm: (B, in_chans, H, W) to (B, dim, H/4, W/4), odd sides rounded up."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image to the first stage's input."""
        return self.norm(self.conv2(self.conv1(x)))


class ConvDownsample(nn.Module):
    """A strided convolution and a norm: (B, in_dim, H, W) to (B, dim, H/2, W/2), odd sides rounded up."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.norm(self.reduction(x))


class NAT(NeighborhoodPyramid):
    """Neighborhood Attention Transformer, dilated (DiNAT) or not. Arguments: `NeighborhoodPyramid`.

    `presets` holds the dilations with which the authors trained detectors and segmenters on the same weights.
    """

    make_stem = ConvStem
    make_downsample = ConvDownsample
    presets: ClassVar[Mapping[str, Dilations]] = {
        "classification": DINAT_DILATIONS,
        "classification_384": ((1, 13), (1, 6), (1, 3), 1),
        "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
        "ade20k": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
        "ade20k_640": ((1, 20), (1, 5, 1, 10), (*(1, 2, 1, 3, 1, 4, 1, 5) * 2, 1, 5), (1, 2)),
        "mask2former_coco": ((1, 14), (1, 4, 1, 7), (*(1, 2, 1, 3) * 4, 1, 3), 1),
    }


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names and those of transformers to ours; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [
        *TRANSFORMERS,
        (r"^patch_embed\.proj\.0\.", "stem.conv1."),
        (r"^patch_embed\.proj\.1\.", "stem.conv2."),
        (r"^patch_embed\.norm\.", "stem.norm."),
        # A stage begins with the downsample that ends the authors' previous level.
        *((rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
        (r"^levels\.", "stages."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^head\.", "head.fc."),
        (r"^(.*)\.layer_scale_parameters$", r"\1.ls1.gamma|\1.ls2.gamma"),
    ]
    # Detectors and segmenters norm the features with norms of their own.
    return translate(state_dict, model, rules, drop=r"^norm\d\.")


def _cfg(url: str = "", **fields) -> PretrainedCfg:
    return cfg(
        url=url and f"https://shi-labs.com/projects/{url}",
        source="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        license="mit",
        first_conv="stem.conv1",
        **fields,
    )


def _nat(name: str, **fields) -> PretrainedCfg:
    return _cfg(f"nat/checkpoints/CLS/{name}.pth", paper="2204.07143", **fields)


def _dinat(name: str, **fields) -> PretrainedCfg:
    return _cfg(f"dinat/checkpoints/{name}.pth", paper="2209.15001", **fields)


def _hub(name: str, ending: str = "in1k-224", **fields) -> PretrainedCfg:
    """The authors' weights in transformers' names, on the hub."""
    paper = "2209.15001" if name.startswith("dinat") else "2204.07143"
    return _cfg(hf_hub_id=f"shi-labs/{name.replace('_', '-')}-{ending}", paper=paper, **fields)


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_IN22K = {"num_classes": 21841}
_TEST = {"input_size": (3, 96, 96), "pool_size": (3, 3)}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.hub_in1k": _hub("nat_mini", top1=81.8, params=19984174, gmacs=2.7),
        "nat_mini.in1k": _nat("nat_mini", top1=81.8, params=19984174, gmacs=2.7),
        "nat_tiny.hub_in1k": _hub("nat_tiny", top1=83.2, params=27901582, gmacs=4.3),
        "nat_tiny.in1k": _nat("nat_tiny", top1=83.2, params=27901582, gmacs=4.3),
        "nat_small.hub_in1k": _hub("nat_small", top1=83.7, params=50743297, gmacs=7.8),
        "nat_small.in1k": _nat("nat_small", top1=83.7, params=50743297, gmacs=7.8),
        "nat_base.hub_in1k": _hub("nat_base", top1=84.3, params=89769652, gmacs=13.7),
        "nat_base.in1k": _nat("nat_base", top1=84.3, params=89769652, gmacs=13.7),
        "dinat_mini.hub_in1k": _hub("dinat_mini", top1=81.8, params=19984174, gmacs=2.7),
        "dinat_mini.in1k": _dinat("imagenet1k/dinat_mini_in1k_224", top1=81.8, params=19984174, gmacs=2.7),
        "dinat_tiny.hub_in1k": _hub("dinat_tiny", top1=82.7, params=27901582, gmacs=4.3),
        "dinat_tiny.in1k": _dinat("imagenet1k/dinat_tiny_in1k_224", top1=82.7, params=27901582, gmacs=4.3),
        "dinat_small.hub_in1k": _hub("dinat_small", top1=83.8, params=50719681, gmacs=7.8),
        "dinat_small.in1k": _dinat("imagenet1k/dinat_small_in1k_224", top1=83.8, params=50719681, gmacs=7.8),
        "dinat_base.hub_in1k": _hub("dinat_base", top1=84.4, params=89769652, gmacs=13.7),
        "dinat_base.in1k": _dinat("imagenet1k/dinat_base_in1k_224", top1=84.4, params=89769652, gmacs=13.7),
        "dinat_large.hub_in22k_ft_in1k": _hub("dinat_large", "in22k-in1k-224", top1=86.6, params=200943514, gmacs=30.6),
        "dinat_large.in22k_ft_in1k": _dinat(
            "imagenet1k/dinat_large_in22k_in1k_224", top1=86.6, params=200943514, gmacs=30.6
        ),
        "dinat_large.in22k": _dinat("imagenet22k/dinat_large_in22k_224", **_IN22K),
        "dinat_large_384.hub_in22k_ft_in1k": _hub(
            "dinat_large", "in22k-in1k-384", top1=87.4, params=200943514, gmacs=89.7, **_AT_384
        ),
        "dinat_large_384.in22k_ft_in1k": _dinat(
            "imagenet1k/dinat_large_in22k_in1k_384", top1=87.4, params=200943514, gmacs=89.7, **_AT_384
        ),
        "dinat_large_384_11x11.hub_in22k_ft_in1k": _hub(
            "dinat_large_11x11", "in22k-in1k-384", top1=87.5, params=201144250, gmacs=92.4, **_AT_384
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _dinat(
            "imagenet1k/dinat_large_in22k_in1k_384_11x11", top1=87.5, params=201144250, gmacs=92.4, **_AT_384
        ),
        "dinat_large_384_11x11.in22k": _dinat("imagenet22k/dinat_large_in22k_224_11x11interp", **_IN22K),
        "test_nat.untrained": _cfg(paper="2204.07143", **_TEST),
        "test_dinat.untrained": _cfg(paper="2209.15001", **_TEST),
    }
)

_MINI = {"dims": (64, 128, 256, 512), "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_TINY = _MINI | {"depths": (3, 4, 18, 5)}
_SMALL = {"dims": (96, 192, 384, 768), "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = _SMALL | {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE = _SMALL | {"dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_TINIEST = {"dims": (16, 32, 64, 96), "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 6), "mlp_ratio": 2.0}


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> NAT:
    return build(NAT, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Mini."""
    return _create("nat_mini", pretrained, kwargs, **_MINI, drop_path_rate=0.2)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Tiny."""
    return _create("nat_tiny", pretrained, kwargs, **_TINY, drop_path_rate=0.2)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Small."""
    return _create("nat_small", pretrained, kwargs, **_SMALL, drop_path_rate=0.3, layer_scale=1e-5)


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Base."""
    return _create("nat_base", pretrained, kwargs, **_BASE, drop_path_rate=0.5, layer_scale=1e-5)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Mini."""
    return _create("dinat_mini", pretrained, kwargs, **_MINI, dilations=DINAT_DILATIONS, drop_path_rate=0.2)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Tiny."""
    return _create("dinat_tiny", pretrained, kwargs, **_TINY, dilations=DINAT_DILATIONS, drop_path_rate=0.2)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Small, unlike NAT-Small without layer scale."""
    return _create("dinat_small", pretrained, kwargs, **_SMALL, dilations=DINAT_DILATIONS, drop_path_rate=0.3)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Base."""
    settings = _BASE | {"dilations": DINAT_DILATIONS, "drop_path_rate": 0.5, "layer_scale": 1e-5}
    return _create("dinat_base", pretrained, kwargs, **settings)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large."""
    return _create("dinat_large", pretrained, kwargs, **_LARGE, dilations=DINAT_DILATIONS, drop_path_rate=0.35)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large at 384 px."""
    settings = _LARGE | {"dilations": "classification_384", "drop_path_rate": 0.35}
    return _create("dinat_large_384", pretrained, kwargs, **settings)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large at 384 px with windows of 11x11."""
    settings = _LARGE | {"kernel_size": 11, "dilations": DINAT_DILATIONS, "drop_path_rate": 0.35}
    return _create("dinat_large_384_11x11", pretrained, kwargs, **settings)


@register_model
def test_nat(pretrained: bool = False, **kwargs) -> NAT:
    """A NAT small enough to test everything in seconds."""
    return _create("test_nat", pretrained, kwargs, **_TINIEST, layer_scale=1e-5)


@register_model
def test_dinat(pretrained: bool = False, **kwargs) -> NAT:
    """A DiNAT small enough to test everything in seconds."""
    return _create("test_dinat", pretrained, kwargs, **_TINIEST, dilations=((1, 3), (1, 2), (1, 2), 1))
