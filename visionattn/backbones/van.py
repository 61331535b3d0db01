"""VAN: a convolutional pyramid whose attention is a large kernel, taken apart into small ones.

Visual Attention Network (Guo et al., CVMJ 2023, arXiv:2202.09741). Checked against
Visual-Attention-Network/VAN-Classification at e19779b and VAN-Segmentation at 8285fc7, from which only names differ.
The released weights were trained on images normalised with mean and deviation 0.5, not with ImageNet's.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.layers.drop import DropPath
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.checkpoint import translate
from visionattn.layers import DepthwiseConv
from visionattn.registry import build, cfg


class LargeKernelAttention(nn.Module):
    """Gate a map with a convolution of 21x21, taken apart: 5x5 and dilated 7x7 by channel, then 1x1 across channels.

    The gate has no activation and no normalisation. Maps (B, dim, H, W) to the same shape.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = DepthwiseConv(dim, 5, **dd)
        self.dilated = DepthwiseConv(dim, 7, dilation=3, **dd)
        self.mix = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the map."""
        gate = self.dilated(self.local(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x * self.mix(gate)


class Attention(nn.Module):
    """Large kernel attention between two 1x1 convolutions, with a residual of its own around all of it."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.gate = LargeKernelAttention(dim, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to the same shape."""
        return x + self.proj_2(self.gate(self.act(self.proj_1(x))))


class ConvMlp(nn.Module):
    """MLP of 1x1 convolutions with a depthwise 3x3 before the activation. (B, dim, H, W) to the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to the same shape."""
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(self.fc1(x))))))


class Block(nn.Module):
    """Attention, then an MLP, each behind a BatchNorm and scaled by channel. (B, dim, H, W) to the same shape."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float = 0.0, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.empty(dim, **dd))
        self.layer_scale_2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with residual paths that hardly count."""
        nn.init.constant_(self.layer_scale_1, 1e-2)
        nn.init.constant_(self.layer_scale_2, 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to the same shape."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A strided convolution and a norm: (B, in_dim, H, W) to (B, dim, H/stride, W/stride), odd sides rounded up."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the map."""
        return self.norm(self.proj(x))


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (B, dim, H, W), whose result is laid out channel by channel.

    Left as the norm lays it out, position by position, it would pass that layout on to all convolutions that follow,
    and on the CPU the depthwise ones take longer so.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W) to the same shape."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class VAN(Pyramid):
    """Visual Attention Network. Every stage ends with a norm, whose result is the feature and the next stage's input.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratios: Hidden width of the MLPs of each stage as a multiple of its channels.
        norm_eps: Epsilon of the stages' norms: 1e-6, or 1e-5 as the authors' segmentation code has it.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        norm_eps: float = 1e-6,
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
        for i, (dim, mlp_ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            blocks = [Block(dim, mlp_ratio, proj_drop_rate, drop_path, **dd) for drop_path in drop_paths[i]]
            halve = PatchEmbed(dims[i - 1], dim, 3, 2, **dd) if i else nn.Identity()
            norm = ChannelNorm(dim, eps=norm_eps, **dd)
            stages.append(Stage(dim, halve, blocks, channels_first=True, norm=norm))
        super().__init__(
            PatchEmbed(in_chans, dims[0], 7, 4, **dd),
            stages,
            nn.Identity(),
            (4, 8, 16, 32),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew, convolutions from a normal distribution by their fan-out."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)


# From the names of transformers, misspelt as they are there, to the authors'.
_TRANSFORMERS = [
    *((rf"^van\.encoder\.stages\.{i}\.embeddings\.", f"patch_embed{i + 1}.") for i in range(4)),
    *((rf"^van\.encoder\.stages\.{i}\.layers\.", f"block{i + 1}.") for i in range(4)),
    *((rf"^van\.encoder\.stages\.{i}\.normalization\.", f"norm{i + 1}.") for i in range(4)),
    (r"^(patch_embed\d)\.convolution\.", r"\1.proj."),
    (r"^(patch_embed\d)\.normalization\.", r"\1.norm."),
    (r"\.pre_normomalization\.", ".norm1."),
    (r"\.post_normalization\.", ".norm2."),
    (r"\.attention\.pre_projection\.conv\.", ".attn.proj_1."),
    (r"\.attention\.post_projection\.", ".attn.proj_2."),
    (r"\.attention\.attention_layer\.attention\.depth_wise\.", ".attn.spatial_gating_unit.conv0."),
    (r"\.attention\.attention_layer\.attention\.depth_wise_dilated\.", ".attn.spatial_gating_unit.conv_spatial."),
    (r"\.attention\.attention_layer\.attention\.point_wise\.", ".attn.spatial_gating_unit.conv1."),
    (r"\.attention_scaling\.weight$", ".layer_scale_1"),
    (r"\.mlp_scaling\.weight$", ".layer_scale_2"),
    (r"\.mlp\.in_dense\.", ".mlp.fc1."),
    (r"\.mlp\.depth_wise\.", ".mlp.dwconv."),
    (r"\.mlp\.out_dense\.", ".mlp.fc2."),
    (r"^classifier\.", "head."),
]


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the names of the authors, mmpretrain and transformers (up to 4) to ours; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [
        # mmpretrain's and transformers' names first become the authors'.
        *_TRANSFORMERS,
        (r"^head\.fc\.", "head."),
        (r"^(patch_embed\d)\.projection\.", r"\1.proj."),
        (r"^blocks(\d)\.", r"block\1."),
        (r"\.attn\.spatial_gating_unit\.DW_conv\.", ".attn.spatial_gating_unit.conv0."),
        (r"\.attn\.spatial_gating_unit\.DW_D_conv\.", ".attn.spatial_gating_unit.conv_spatial."),
        # Ours count from zero.
        (r"^patch_embed1\.", "stem."),
        *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
        *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        *((rf"^norm{i + 1}\.", f"stages.{i}.norm.") for i in range(4)),
        (r"\.spatial_gating_unit\.conv0\.", ".gate.local."),
        (r"\.spatial_gating_unit\.conv_spatial\.", ".gate.dilated."),
        (r"\.spatial_gating_unit\.conv1\.", ".gate.mix."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
        (r"^head\.", "head.fc."),
    ]
    # transformers' model has a norm that it never uses.
    return translate(state_dict, model, rules, drop=r"^van\.layernorm\.")


def _hub(size: str, file: str) -> dict[str, str]:
    """The authors' repository on the hub."""
    return {"hf_hub_id": f"Visual-Attention-Network/VAN-{size}-original", "hf_hub_filename": f"{file}.pth.tar"}


# The authors' files of the larger ones; mmpretrain has converted them.
_PAGE = "https://cloud.tsinghua.edu.cn/d/0100f0cea37d41ba8d08/"
_MM = "https://download.openmmlab.com/mmclassification/v0/van/van-{}.pth"


def _cfg(**fields) -> PretrainedCfg:
    return cfg(
        source="https://github.com/Visual-Attention-Network/VAN-Classification",
        paper="2202.09741",
        license="apache-2.0",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=0.9,
        **fields,
    )


_IN22K = {"num_classes": 21841}

default_cfgs = generate_default_cfgs(
    {
        "van_b0.in1k": _cfg(**_hub("Tiny", "van_tiny_754"), top1=75.4, params=4105800, gmacs=0.9),
        "van_b1.in1k": _cfg(**_hub("Small", "van_small_811"), top1=81.1, params=13861800, gmacs=2.5),
        "van_b2.in1k": _cfg(**_hub("Base", "van_base_828"), top1=82.8, params=26578472, gmacs=5.0),
        "van_b3.in1k": _cfg(**_hub("Large", "van_large_839"), top1=83.9, params=44765608, gmacs=9.0),
        "van_b4.mm_in1k": _cfg(
            url=_MM.format("b4_3rdparty_in1k_20220909-f4665b92"), top1=84.2, params=60283176, gmacs=12.2
        ),
        "van_b4.in1k": _cfg(page=_PAGE, top1=84.2, params=60283176, gmacs=12.2),
        "van_b4.mm_in22k": _cfg(url=_MM.format("b4_3rdparty_in21k_20220909-db926b18"), **_IN22K),
        # By the star, and by their place behind, the models of 1000 classes are the default, though no program can
        # fetch their weights.
        "van_b5.mm_in22k": _cfg(url=_MM.format("b5_3rdparty_in21k_20220909-18e904e3"), **_IN22K),
        "van_b5.in22k_ft_in1k*": _cfg(page=_PAGE, params=89967688, gmacs=17.2),
        "van_b6.mm_in22k": _cfg(url=_MM.format("b6_3rdparty_in21k_20220909-96c2cb3a"), **_IN22K),
        "van_b6.in22k_ft_in1k*": _cfg(page=_PAGE, params=199829416, gmacs=38.4),
        "test_van.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

_B0 = {"dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2), "drop_path_rate": 0.1}


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> VAN:
    return build(VAN, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def van_b0(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B0."""
    return _create("van_b0", pretrained, kwargs, **_B0)


@register_model
def van_b1(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B1."""
    return _create("van_b1", pretrained, kwargs, depths=(2, 2, 4, 2), drop_path_rate=0.1)


@register_model
def van_b2(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B2."""
    return _create("van_b2", pretrained, kwargs, depths=(3, 3, 12, 3), drop_path_rate=0.1)


@register_model
def van_b3(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B3."""
    return _create("van_b3", pretrained, kwargs, depths=(3, 5, 27, 3), drop_path_rate=0.2)


@register_model
def van_b4(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B4."""
    return _create("van_b4", pretrained, kwargs, depths=(3, 6, 40, 3))


@register_model
def van_b5(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B5."""
    return _create("van_b5", pretrained, kwargs, dims=(96, 192, 480, 768), depths=(3, 3, 24, 3))


@register_model
def van_b6(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B6; its third stage has 384 channels as in the authors' code, not mmpretrain's 480."""
    return _create("van_b6", pretrained, kwargs, dims=(96, 192, 384, 768), depths=(6, 6, 90, 6))


@register_model
def test_van(pretrained: bool = False, **kwargs) -> VAN:
    """A VAN small enough to test everything in seconds."""
    settings = {"dims": (16, 24, 32, 48), "depths": (1, 2, 1, 1), "mlp_ratios": (4.0, 4.0, 2.0, 2.0)}
    return _create("test_van", pretrained, kwargs, **settings)
