"""InLine: linear attention whose weights add up to one, with a local kernel that each image predicts for itself.

Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv:2412.06590). Checked
against LeapLabTHU/InLine at e463a6f, from which names differ, and PVT's two projections are one here.
"""

from collections.abc import Mapping
from functools import partial

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones import _cswin, _deit, _pvt, _swin
from visionattn.backbones._linear import TINIEST, adapt, trunk_cfg
from visionattn.checkpoint import translate
from visionattn.layers import AttentionBlock, GroupedLinear, conv_each, zero_pad
from visionattn.registry import build
from visionattn_kernels import linear_attention


@torch.jit.ignore
def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The operator; TorchScript calls back into Python for it."""
    return linear_attention(query, key, value, "subtraction")


@register_notrace_module  # shapes decide the views, which fx need not see
class InLineAttention(nn.Module):
    """Injective linear attention over all tokens, plus a depthwise 3x3 convolution whose kernel the mean predicts.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        lepe: Whether a trained depthwise convolution of the values is added as well, as in CSWin.
        proj_drop: Dropout after the output projection.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, lepe: bool = False, proj_drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.residual = nn.Sequential(
            GroupedLinear(dim, dim, num_heads, **dd),
            nn.GELU(),
            GroupedLinear(dim, 9 * dim, num_heads, **dd),
        )
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if lepe else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C) to the same shape; `mean` (B, C) predicts the kernel, by default that of the map."""
        mean = x.mean([1, 2]) if mean is None else mean
        return self.attend(x.flatten(1, 2), mean, x.shape[1], x.shape[2]).view(x.shape)

    def attend(self, x: Tensor, mean: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, C), of which the last H W are a map, to the same shape; `mean` (B, C) predicts the kernel."""
        batch, tokens, dim = x.shape
        # Cut along the channels, the three gradients join in one copy; as slices of a stack they would be copied twice.
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts]
        out = _attend(query, key, value).transpose(1, 2).reshape(batch, tokens, dim)
        local = self.local(parts[2][:, tokens - height * width :], mean, height, width)
        local = zero_pad(local, [0, 0, tokens - height * width, 0])
        return self.proj_drop(self.proj(out + local))

    def local(self, value: Tensor, mean: Tensor, height: int, width: int) -> Tensor:
        """Convolve the values (B, H W, C) of each image with its own kernel, to which that of CSWin is added."""
        kernel = self.residual(mean).view(value.shape[0], value.shape[2], 3, 3)
        bias: Tensor | None = None
        if self.get_v is not None:
            kernel = kernel + self.get_v.weight.squeeze(1)
            bias = self.get_v.bias
        value = value.transpose(1, 2).unflatten(2, (height, width))
        return conv_each(value, kernel, bias).flatten(2).transpose(1, 2)


class TokenInLineAttention(InLineAttention):
    """The same on a class token and the tokens of a map; the class token has no local part, but a share in the mean."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, 1 + H W, C) to the same shape."""
        return self.attend(x, x.mean(1), height, width)


class RawMeanBlock(AttentionBlock):
    """CSWin's block here: what predicts the kernel is the mean of the block's input before its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), x.mean([1, 2]))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _raw_mean_block(dim: int, attn: nn.Module, **kwargs) -> AttentionBlock:
    return (RawMeanBlock if isinstance(attn, InLineAttention) else AttentionBlock)(dim, attn, **kwargs)


class InLineDeiT(_deit.DeiT):
    """InLine on DeiT. Arguments: `LinearTrunk`, with one width, depth of a stage and number of heads."""

    attention = TokenInLineAttention


class InLinePVT(_pvt.PVT):
    """InLine on PVT. Arguments: `LinearTrunk`."""

    attention = InLineAttention


class InLineSwin(_swin.Swin):
    """InLine on Swin. Arguments: `LinearTrunk`."""

    attention = InLineAttention


class InLineCSWin(_cswin.CSWin):
    """InLine on CSWin. Arguments: `LinearTrunk`."""

    attention = staticmethod(partial(InLineAttention, lepe=True))
    make_block = staticmethod(_raw_mean_block)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours and resize tables of another image size; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    return translate(state_dict, model, model.rules, drop=_swin.DROP, adapt=adapt)


_cfg = partial(trunk_cfg, source="https://github.com/LeapLabTHU/InLine", paper="2412.06590")
_deit_cfg = partial(_cfg, tokens=True)

default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.in1k": _deit_cfg("1d6b8191ad6d4114b291", top1=74.5, params=6477736, gmacs=1.1),
        "inline_deit_small.in1k": _deit_cfg("2f3898b07e9247f3beb3", 288, top1=80.2, params=16734760, gmacs=5.0),
        "inline_deit_base.in1k": _deit_cfg("10bdd726d4b0435eb34e", 448, top1=82.3, params=23797096, gmacs=17.2),
        "inline_pvt_tiny.in1k": _cfg("90ac52b1555b401eb5e6", top1=78.2, params=12032232, gmacs=2.0),
        "inline_pvt_small.in1k": _cfg("1ab953b2479d433080a3", top1=82.0, params=21556136, gmacs=3.9),
        "inline_pvt_medium.in1k": _cfg("a72aec31e6084bc0a280", top1=83.2, params=37618856, gmacs=6.9),
        # The authors count 50.2 million parameters; their code has these.
        "inline_pvt_large.in1k": _cfg("efd91318ba964f01b288", top1=83.6, params=51154280, gmacs=10.2),
        "inline_swin_tiny.in1k": _cfg("32810869fcc34410966b", top1=82.4, params=29223544, gmacs=4.5),
        "inline_swin_small.in1k": _cfg("e9657fd247c04c7cb1a1", top1=83.6, params=49793296, gmacs=8.7),
        "inline_swin_base.in1k": _cfg("bf23564bb64c420aafe1", top1=84.1, params=88350120, gmacs=15.4),
        "inline_swin_base_384.in1k": _cfg(size=384, crop=False, params=88465320),
        "inline_cswin_tiny.in1k": _cfg("49fa2ecc543647c4b970", top1=83.2, params=20604520, gmacs=4.3),
        "inline_cswin_small.in1k": _cfg("59f4e65f776f4052b93c", top1=83.8, params=33032872, gmacs=6.8),
        "inline_cswin_base.in1k": _cfg("91e17121df284ae38521", top1=84.5, params=73413640, gmacs=14.9),
        "inline_cswin_base_384.in1k": _cfg(size=384, top1=85.7, params=73413640, gmacs=46.3),
        "test_inline_deit.untrained": _deit_cfg(size=96),
        "test_inline_pvt.untrained": _cfg(size=96),
        "test_inline_swin.untrained": _cfg(size=96),
        "test_inline_cswin.untrained": _cfg(size=96),
    }
)

_DEIT_S = {"dims": 320, "num_heads": 10, "img_size": 288}
_DEIT_B = {"dims": 384, "num_heads": 12, "img_size": 448}
_PVT = {"dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "mlp_ratios": (8.0, 8.0, 4.0, 4.0)}


def _create(family: type[nn.Module], variant: str, pretrained: bool, kwargs: dict, **settings) -> nn.Module:
    return build(family, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-T."""
    return _create(InLineDeiT, "inline_deit_tiny", pretrained, kwargs, dims=192, num_heads=6, drop_path_rate=0.1)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-S at 288 px, of 320 channels."""
    return _create(InLineDeiT, "inline_deit_small", pretrained, kwargs, **_DEIT_S, drop_path_rate=0.1)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-B at 448 px, of 384 channels."""
    return _create(InLineDeiT, "inline_deit_base", pretrained, kwargs, **_DEIT_B, drop_path_rate=0.1)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-T."""
    return _create(InLinePVT, "inline_pvt_tiny", pretrained, kwargs, **_PVT, depths=(2, 2, 2, 2), drop_path_rate=0.1)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-S."""
    return _create(InLinePVT, "inline_pvt_small", pretrained, kwargs, **_PVT, depths=(3, 4, 6, 3), drop_path_rate=0.1)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-M."""
    return _create(InLinePVT, "inline_pvt_medium", pretrained, kwargs, **_PVT, depths=(3, 4, 18, 3), drop_path_rate=0.3)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-L."""
    return _create(InLinePVT, "inline_pvt_large", pretrained, kwargs, **_PVT, depths=(3, 8, 27, 3), drop_path_rate=0.3)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-T."""
    return _create(InLineSwin, "inline_swin_tiny", pretrained, kwargs, **_swin.TINY, drop_path_rate=0.2)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-S."""
    return _create(InLineSwin, "inline_swin_small", pretrained, kwargs, **_swin.SMALL, drop_path_rate=0.3)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-B."""
    return _create(InLineSwin, "inline_swin_base", pretrained, kwargs, **_swin.BASE, drop_path_rate=0.5)


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-B at 384 px."""
    return _create(
        InLineSwin, "inline_swin_base_384", pretrained, kwargs, **_swin.BASE, img_size=384, drop_path_rate=0.5
    )


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-T."""
    return _create(InLineCSWin, "inline_cswin_tiny", pretrained, kwargs, **_cswin.TINY, drop_path_rate=0.2)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-S."""
    return _create(InLineCSWin, "inline_cswin_small", pretrained, kwargs, **_cswin.SMALL, drop_path_rate=0.4)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-B."""
    return _create(InLineCSWin, "inline_cswin_base", pretrained, kwargs, **_cswin.BASE, drop_path_rate=0.5)


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-B at 384 px."""
    return _create(
        InLineCSWin, "inline_cswin_base_384", pretrained, kwargs, **_cswin.BASE, img_size=384, drop_path_rate=0.7
    )


@register_model
def test_inline_deit(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """Small enough to test everything in seconds."""
    return _create(InLineDeiT, "test_inline_deit", pretrained, kwargs, dims=32, depth=1, num_heads=2, img_size=96)


@register_model
def test_inline_pvt(pretrained: bool = False, **kwargs) -> InLinePVT:
    """Small enough to test everything in seconds."""
    return _create(InLinePVT, "test_inline_pvt", pretrained, kwargs, **TINIEST, img_size=96)


@register_model
def test_inline_swin(pretrained: bool = False, **kwargs) -> InLineSwin:
    """Small enough to test everything in seconds."""
    return _create(
        InLineSwin, "test_inline_swin", pretrained, kwargs, **TINIEST, img_size=96, linear_depths=(1, 2, 0, 0)
    )


@register_model
def test_inline_cswin(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """Small enough to test everything in seconds."""
    return _create(
        InLineCSWin, "test_inline_cswin", pretrained, kwargs, **TINIEST, img_size=96, linear_depths=(1, 1, 0, 0)
    )
