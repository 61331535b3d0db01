"""ResNets and a MobileNetV2 with efficient local attention in every block.

ELA: Efficient Local Attention for Deep Convolutional Neural Networks (Xu and Wan, 2024, arXiv:2403.01123). The authors
published no code, and where in a block the attention stands is not known to us. In the ResNets it stands behind the
last norm of the residual path, where squeeze-and-excitation stands too; `placement="conv"` puts it behind the
convolution in the middle. In the MobileNet it stands behind the depthwise convolution, since the norm's groups divide
no other widths, nor any with variant t. Rows and columns share their convolution; with `shared=False` they do not.
The hosts are timm's computation. No accuracy is quoted: we have not read the paper's tables.
"""

from collections.abc import Mapping
from functools import partial

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg
from torch import Tensor, nn

from visionattn.backbones._byob import Byob
from visionattn.backbones._mobilenet import HEADLESS, MOBILENET_V2, MobileNet
from visionattn.checkpoint import translate
from visionattn.layers import ELA
from visionattn.registry import build, cfg

_DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_DIMS = (64, 128, 256, 512)


class ELAResNet(Byob):
    """A ResNet with efficient local attention in every block.

    Args:
        kind: Variant of the attention: "t", "b", "s" or "l".
        depth: Layers of the ResNet: 18, 50 or 101.
        placement: "output" for attention to the output of a block's residual path, "conv" for attention behind the
            3x3 convolution in it (the first of two in the ResNet-18).
        shared: Whether rows and columns share their convolution.
        stages: Width and number of blocks of each stage, in place of the ResNet's.
        **kwargs: As for timm's `ByobNet`.

    Raises:
        ValueError: There is no such depth, placement or variant.
    """

    def __init__(
        self,
        kind: str = "b",
        depth: int = 50,
        placement: str = "output",
        shared: bool = True,
        stages: tuple[tuple[int, int], ...] | None = None,
        **kwargs,
    ):
        if depth not in _DEPTHS:
            raise ValueError(f"depth must be one of {sorted(_DEPTHS)}, got {depth}")
        if placement not in ("output", "conv"):
            raise ValueError(f"placement must be 'output' or 'conv', got {placement!r}")
        block, expansion = ("basic", 1) if depth == 18 else ("bottle", 4)
        blocks = tuple(
            ByoBlockCfg(type=block, d=number, c=expansion * dim, s=1 if i == 0 else 2, gs=0, br=1 / expansion)
            for i, (dim, number) in enumerate(stages or zip(_DIMS, _DEPTHS[depth], strict=True))
        )
        config = ByoModelCfg(
            blocks=blocks,
            stem_type="7x7",
            stem_pool="maxpool",
            stem_chs=stages[0][0] if stages else 64,
            attn_layer=partial(ELA, variant=kind, shared=shared),
            block_kwargs={"attn_last": placement == "output"},
        )
        super().__init__(cfg=config, **kwargs)


class ELAMobileNet(MobileNet):
    """A MobileNetV2 with efficient local attention behind every depthwise convolution.

    Args:
        kind: Variant of the attention: "b", "s" or "l".
        shared: Whether rows and columns share their convolution.
        stages: timm's description of each stage.
        **kwargs: As for timm's `EfficientNet`.

    Raises:
        ValueError: The attention does not fit a block's width.
    """

    attention = ELA

    def __init__(self, kind: str = "b", shared: bool = True, stages: tuple[str, ...] = MOBILENET_V2, **kwargs):
        super().__init__(stages, **kwargs)
        dd = {name: kwargs.get(name) for name in ("device", "dtype")}
        for block in self.blocks.children():
            for layer in block:
                layer.se = ELA(layer.conv_dw.out_channels, kind, shared=shared, **dd)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Take our own checkpoints; there are no others.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    return translate(state_dict, model, rules=(), free=("head.fc.", "classifier."), headless=HEADLESS)


def _cfg(**fields) -> PretrainedCfg:
    # There is no code of the authors and there are no weights; the code is ours.
    return cfg(source="https://arxiv.org/abs/2403.01123", paper="2403.01123", license="apache-2.0", **fields)


_RESNET = {"first_conv": "stem.conv1.conv"}
_MOBILENET = {"first_conv": "conv_stem", "classifier": "classifier"}

# Parameters of the host, the channels that its attention stands on, and how many parameters a channel has.
_HOSTS = {"resnet18": (11689512, 1920), "resnet50": (25557032, 15104), "resnet101": (44549160, 32512)}
_MOBILENET_V2 = (3504872, 7136)
_A_CHANNEL = {"t": 7, "b": 9, "s": 42, "l": 58}


def _params(kind: str, host: int, channels: int) -> int:
    return host + _A_CHANNEL[kind] * channels


default_cfgs = generate_default_cfgs(
    {
        **{
            f"ela_{kind}_{host}.untrained": _cfg(params=_params(kind, *sizes), **_RESNET)
            for kind in "tbsl"
            for host, sizes in _HOSTS.items()
        },
        **{
            f"ela_{kind}_mobilenetv2.untrained": _cfg(params=_params(kind, *_MOBILENET_V2), **_MOBILENET)
            for kind in "bsl"
        },
        "test_ela_resnet.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), **_RESNET),
        "test_ela_mobilenetv2.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), **_MOBILENET),
    }
)


def _create(family: type[nn.Module], name: str, pretrained: bool, kwargs: dict, **settings) -> nn.Module:
    return build(family, name, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def ela_t_resnet18(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-18 with ELA-T."""
    return _create(ELAResNet, "ela_t_resnet18", pretrained, kwargs, kind="t", depth=18)


@register_model
def ela_t_resnet50(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-50 with ELA-T."""
    return _create(ELAResNet, "ela_t_resnet50", pretrained, kwargs, kind="t", depth=50)


@register_model
def ela_t_resnet101(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-101 with ELA-T."""
    return _create(ELAResNet, "ela_t_resnet101", pretrained, kwargs, kind="t", depth=101)


@register_model
def ela_b_resnet18(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-18 with ELA-B."""
    return _create(ELAResNet, "ela_b_resnet18", pretrained, kwargs, kind="b", depth=18)


@register_model
def ela_b_resnet50(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-50 with ELA-B."""
    return _create(ELAResNet, "ela_b_resnet50", pretrained, kwargs, kind="b", depth=50)


@register_model
def ela_b_resnet101(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-101 with ELA-B."""
    return _create(ELAResNet, "ela_b_resnet101", pretrained, kwargs, kind="b", depth=101)


@register_model
def ela_s_resnet18(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-18 with ELA-S."""
    return _create(ELAResNet, "ela_s_resnet18", pretrained, kwargs, kind="s", depth=18)


@register_model
def ela_s_resnet50(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-50 with ELA-S."""
    return _create(ELAResNet, "ela_s_resnet50", pretrained, kwargs, kind="s", depth=50)


@register_model
def ela_s_resnet101(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-101 with ELA-S."""
    return _create(ELAResNet, "ela_s_resnet101", pretrained, kwargs, kind="s", depth=101)


@register_model
def ela_l_resnet18(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-18 with ELA-L."""
    return _create(ELAResNet, "ela_l_resnet18", pretrained, kwargs, kind="l", depth=18)


@register_model
def ela_l_resnet50(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-50 with ELA-L."""
    return _create(ELAResNet, "ela_l_resnet50", pretrained, kwargs, kind="l", depth=50)


@register_model
def ela_l_resnet101(pretrained: bool = False, **kwargs) -> ELAResNet:
    """ResNet-101 with ELA-L."""
    return _create(ELAResNet, "ela_l_resnet101", pretrained, kwargs, kind="l", depth=101)


@register_model
def ela_b_mobilenetv2(pretrained: bool = False, **kwargs) -> ELAMobileNet:
    """MobileNetV2 with ELA-B."""
    return _create(ELAMobileNet, "ela_b_mobilenetv2", pretrained, kwargs, kind="b")


@register_model
def ela_s_mobilenetv2(pretrained: bool = False, **kwargs) -> ELAMobileNet:
    """MobileNetV2 with ELA-S."""
    return _create(ELAMobileNet, "ela_s_mobilenetv2", pretrained, kwargs, kind="s")


@register_model
def ela_l_mobilenetv2(pretrained: bool = False, **kwargs) -> ELAMobileNet:
    """MobileNetV2 with ELA-L."""
    return _create(ELAMobileNet, "ela_l_mobilenetv2", pretrained, kwargs, kind="l")


@register_model
def test_ela_resnet(pretrained: bool = False, **kwargs) -> ELAResNet:
    """A ResNet with ELA-B small enough to test everything in seconds."""
    settings = {"depth": 18, "stages": ((16, 1), (16, 2), (32, 1), (48, 1)), "zero_init_last": False}
    return _create(ELAResNet, "test_ela_resnet", pretrained, kwargs, **settings)


@register_model
def test_ela_mobilenetv2(pretrained: bool = False, **kwargs) -> ELAMobileNet:
    """A MobileNetV2 with ELA-S small enough to test everything in seconds."""
    stages = ("ds_r1_k3_s1_c16", "ir_r1_k3_s2_e3_c16", "ir_r2_k3_s2_e3_c16", "ir_r1_k3_s2_e3_c32", "ir_r1_k3_s2_e3_c32")
    settings = {"kind": "s", "stages": stages, "stem_size": 16, "num_features": 64}
    return _create(ELAMobileNet, "test_ela_mobilenetv2", pretrained, kwargs, **settings)
