"""MobileNets in which subspace attention stands in for whole blocks, or behind some.

ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks (Saini et al., WACV 2020,
arXiv:2006.15102). The authors published the module (Nandan91/ULSAM at 9a07d68) but neither nets nor weights. The kinds
of the blocks that it replaces follow from the published parameters and multiply-accumulates; which of several equal
blocks is ours to choose, and `replaced` chooses another. The paper also puts modules behind blocks, which `added` does:
with none replaced and one added where a MobileNetV2 has 160 channels, it gives 71.64 % top-1. The hosts are timm's,
whose MobileNetV2 has 0.8 million multiply-accumulates more than the paper counts. A replaced block loses its skip: the
module has its own.
"""

from collections.abc import Mapping, Sequence

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._mobilenet import HEADLESS, MOBILENET_V1, MOBILENET_V2, MobileNet
from visionattn.checkpoint import translate
from visionattn.layers import ULSAM
from visionattn.registry import build, cfg


class ULSAMMobileNet(MobileNet):
    """A MobileNet with subspace attention in place of some blocks or behind some; features of strides 4 to 32.

    Args:
        stages: timm's description of each stage.
        replaced: Stage and number of each block to replace, both from 0; the first block of a stage, which changes the
            shape of the map, must stay.
        added: Stage and number of each block to put a module behind.
        num_subspaces: Groups of channels of each module.
        momentum: Of the modules' batch norms, as of `ULSAM`.
        **kwargs: As for timm's `EfficientNet`.

    Raises:
        ValueError: There is no such block, or one to replace is the first of its stage.
    """

    attention = ULSAM

    def __init__(
        self,
        stages: Sequence[str],
        replaced: Sequence[tuple[int, int]] = (),
        added: Sequence[tuple[int, int]] = (),
        num_subspaces: int = 4,
        momentum: float = 0.9,
        **kwargs,
    ):
        super().__init__(stages, **kwargs)
        self._check(replaced, added)
        dd = {name: kwargs.get(name) for name in ("device", "dtype")}
        dims = [stage[0].feature_info("")["num_chs"] for stage in self.blocks]
        for stage, number in replaced:
            self.blocks[stage][number] = ULSAM(dims[stage], num_subspaces, momentum, **dd)
        for stage, number in added:
            module = ULSAM(dims[stage], num_subspaces, momentum, **dd)
            self.blocks[stage][number] = nn.Sequential(self.blocks[stage][number], module)

    def _check(self, replaced: Sequence[tuple[int, int]], added: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError where a place is none."""
        for stage, number in replaced:
            if number < 1:
                raise ValueError(f"replaced must name blocks behind the first of a stage, got {(stage, number)}")
        depths = [len(stage) for stage in self.blocks]
        for stage, number in (*replaced, *added):
            if not 0 <= stage < len(depths) or not 0 <= number < depths[stage]:
                raise ValueError(f"blocks must be of stages with {depths} blocks, got {(stage, number)}")


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the names of timm's host with the authors' modules to ours; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [(r"^(.*)\.subspaces\.(\d+)\.(.*)$", r"\1.\3#\2")]
    return translate(state_dict, model, rules, free=("classifier.",), headless=HEADLESS)


def _cfg(**fields) -> PretrainedCfg:
    defaults = {"source": "https://github.com/Nandan91/ULSAM", "first_conv": "conv_stem", "classifier": "classifier"}
    # The authors' repository names no licence; nothing of it is used, and there are no weights.
    return cfg(paper="2006.15102", license="apache-2.0", **defaults, **fields)


default_cfgs = generate_default_cfgs(
    {
        "ulsam_mobilenetv1.untrained": _cfg(top1=70.43, params=3965748, gmacs=0.517),
        "ulsam_mobilenetv2.untrained": _cfg(top1=71.52, params=3067904, gmacs=0.26188),
        "test_ulsam.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> ULSAMMobileNet:
    return build(ULSAMMobileNet, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def ulsam_mobilenetv1(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    """MobileNetV1 with attention for one of five blocks of 512 channels; published with 4 subspaces: 70.43."""
    return _create("ulsam_mobilenetv1", pretrained, kwargs, stages=MOBILENET_V1, replaced=((3, 3),), num_features=0)


@register_model
def ulsam_mobilenetv2(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    """MobileNetV2 with attention for a block of 96 and one of 160 channels; published with 4 subspaces: 71.52."""
    return _create("ulsam_mobilenetv2", pretrained, kwargs, stages=MOBILENET_V2, replaced=((4, 2), (5, 2)))


@register_model
def test_ulsam(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    """A MobileNetV1 with subspace attention small enough to test everything in seconds."""
    stages = ("dsa_r1_k3_s1_c16", "dsa_r1_k3_s2_c16", "dsa_r2_k3_s2_c32", "dsa_r2_k3_s2_c48", "dsa_r1_k3_s2_c64")
    settings = {"stages": stages, "replaced": ((3, 1),), "stem_size": 16, "num_features": 0}
    return _create("test_ulsam", pretrained, kwargs, **settings)
