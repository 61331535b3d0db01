"""DiNAT_s: Swin's layout with dilated neighborhood attention in place of shifted windows.

Dilated Neighborhood Attention Transformer (Hassani and Shi, arXiv:2209.15001), the "simple" variant. Checked against
SHI-Labs/Neighborhood-Attention-Transformer at d334f5b, from which the layout differs: maps are (B, C, H, W) between
stages, and a stage begins with the merging that ends the previous one there.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from visionattn.backbones._neighborhood import Dilations, NeighborhoodPyramid, PatchStem
from visionattn.checkpoint import translate
from visionattn.registry import build, cfg

# Odd blocks reach as far as the stage's map at 224 px allows: 56, 28, 14, 7 divided by K = 7.
DILATIONS = ((1, 8), (1, 4), (1, 2), 1)


class MergeDownsample(nn.Module):
    """Swin's patch merging on maps: (B, in_dim, H, W) to (B, dim, H/2, W/2), odd sides padded with zeros."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.merging = PatchMerging(in_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.merging(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DiNATS(NeighborhoodPyramid):
    """Simple Dilated Neighborhood Attention Transformer. Arguments: `NeighborhoodPyramid`.

    `presets` holds the dilations with which the authors trained detectors and segmenters on the same weights.
    """

    make_stem = staticmethod(partial(PatchStem, patch_size=4))
    make_downsample = MergeDownsample
    presets: ClassVar[Mapping[str, Dilations]] = {
        "classification": DILATIONS,
        "classification_384": ((1, 13), (1, 6), (1, 3), 1),
        "coco": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
        "ade20k": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
        "ade20k_640": ((1, 20), (1, 10), (*(1, 2, 1, 3, 1, 4, 1, 5) * 2, 1, 5), (1, 2)),
    }


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [
        (r"^patch_embed\.", "stem."),
        # A stage begins with the merging that ends the authors' previous layer.
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.merging.") for i in range(3)),
        (r"^layers\.", "stages."),
        (r"^head\.", "head.fc."),
    ]
    # Detectors and segmenters norm the features with norms of their own.
    return translate(state_dict, model, rules, drop=r"^norm\d\.")


def _cfg(path: str = "", **fields) -> PretrainedCfg:
    return cfg(
        url=path and f"https://shi-labs.com/projects/dinat/checkpoints/{path}.pth",
        source="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        paper="2209.15001",
        license="mit",
        **fields,
    )


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224", top1=81.8, params=28288354, gmacs=4.5),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224", top1=83.5, params=49606258, gmacs=8.7),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224", top1=83.8, params=87768224, gmacs=15.4),
        "dinat_s_large.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_224", top1=86.5, params=196532476, gmacs=34.5
        ),
        "dinat_s_large.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224", num_classes=21841),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384",
            top1=87.4,
            params=196532476,
            gmacs=101.5,
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
        "test_dinat_s.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

_TINY = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "dilations": DILATIONS}
_SMALL = _TINY | {"depths": (2, 2, 18, 2)}
_BASE = _SMALL | {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE = _SMALL | {"dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> DiNATS:
    return build(DiNATS, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> DiNATS:
    """DiNAT_s-Tiny."""
    return _create("dinat_s_tiny", pretrained, kwargs, **_TINY, drop_path_rate=0.2)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> DiNATS:
    """DiNAT_s-Small."""
    return _create("dinat_s_small", pretrained, kwargs, **_SMALL, drop_path_rate=0.3)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> DiNATS:
    """DiNAT_s-Base."""
    return _create("dinat_s_base", pretrained, kwargs, **_BASE, drop_path_rate=0.5)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> DiNATS:
    """DiNAT_s-Large."""
    return _create("dinat_s_large", pretrained, kwargs, **_LARGE, drop_path_rate=0.35)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> DiNATS:
    """DiNAT_s-Large at 384 px."""
    settings = _LARGE | {"dilations": "classification_384", "drop_path_rate": 0.35}
    return _create("dinat_s_large_384", pretrained, kwargs, **settings)


@register_model
def test_dinat_s(pretrained: bool = False, **kwargs) -> DiNATS:
    """A DiNAT_s small enough to test everything in seconds."""
    settings = {"dims": (16, 32, 48, 64), "depths": (2, 1, 2, 1), "num_heads": (1, 2, 3, 4), "mlp_ratio": 2.0}
    return _create("test_dinat_s", pretrained, kwargs, **settings, dilations=((1, 3), (1, 2), (1, 2), 1))
