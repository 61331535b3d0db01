"""InLine: linear attention whose weights add up to one, with a local kernel that each image predicts for itself.

Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv:2412.06590). Checked
against LeapLabTHU/InLine at e463a6f, from which names differ, and PVT's two projections are one here.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones import _cswin, _deit, _pvt, _swin
from visionattn.backbones._linear import adapt
from visionattn.checkpoint import translate
from visionattn.layers import AttentionBlock
from visionattn.registry import build, cfg
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
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if lepe else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return self.attend(x.flatten(1, 2), x.mean([1, 2]), x.shape[1], x.shape[2]).view(x.shape)

    def attend(self, x: Tensor, mean: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, C), of which the last H W are a map, to the same shape; `mean` (B, C) predicts the kernel."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x)
        heads = qkv.view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        out = _attend(heads[0], heads[1], heads[2]).transpose(1, 2).reshape(batch, tokens, dim)
        local = self.local(qkv[:, tokens - height * width :, 2 * dim :], mean, height, width)
        if tokens > height * width:
            local = F.pad(local, (0, 0, tokens - height * width, 0))
        return self.proj_drop(self.proj(out + local))

    def local(self, value: Tensor, mean: Tensor, height: int, width: int) -> Tensor:
        """Convolve the values (B, H W, C) of each image with its own kernel, to which that of CSWin is added."""
        batch, tokens, dim = value.shape
        kernel = self.residual(mean.unsqueeze(-1)).view(batch, dim, 3, 3)
        bias: Tensor | None = None
        if self.get_v is not None:
            kernel = kernel + self.get_v.weight.squeeze(1)
            trained = self.get_v.bias
            if trained is not None:
                bias = trained.repeat(batch)
        value = value.transpose(1, 2).reshape(1, batch * dim, height, width)
        kernel = kernel.to(value.dtype).view(batch * dim, 1, 3, 3)
        bias = None if bias is None else bias.to(value.dtype)
        return F.conv2d(value, kernel, bias, padding=1, groups=batch * dim).view(batch, dim, tokens).transpose(1, 2)


class TokenInLineAttention(InLineAttention):
    """The same on a class token and the tokens of a map; the class token has no local part, but a share in the mean."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, 1 + H W, C) to the same shape."""
        return self.attend(x, x.mean(1), height, width)


class RawMeanInLineAttention(InLineAttention):
    """The same with the mean of what a norm was applied to."""

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return self.attend(x.flatten(1, 2), mean, x.shape[1], x.shape[2]).view(x.shape)


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

    rules = _deit.RULES

    def __init__(self, **kwargs):
        super().__init__(make_attention=[TokenInLineAttention] * 4, **kwargs)


class InLinePVT(_pvt.PVT):
    """InLine on PVT. Arguments: `LinearTrunk`."""

    rules = _pvt.RULES

    def __init__(self, **kwargs):
        super().__init__(make_attention=[InLineAttention] * 4, **kwargs)


class InLineSwin(_swin.Swin):
    """InLine on Swin. Arguments: `LinearTrunk`."""

    rules = _swin.RULES

    def __init__(self, **kwargs):
        super().__init__(make_attention=[InLineAttention] * 4, **kwargs)


class InLineCSWin(_cswin.CSWin):
    """InLine on CSWin. Arguments: `LinearTrunk`."""

    make_block = staticmethod(_raw_mean_block)
    rules = _cswin.RULES

    def __init__(self, **kwargs):
        super().__init__(make_attention=[partial(RawMeanInLineAttention, lepe=True)] * 4, **kwargs)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours and resize tables of another image size; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    return translate(state_dict, model, model.rules, drop=_swin.DROP, adapt=adapt)


def _cfg(id: str = "", size: int = 224, reduction: int = 32, **fields) -> PretrainedCfg:
    side = size // reduction
    return cfg(
        page=id and f"https://cloud.tsinghua.edu.cn/f/{id}/?dl=1",
        source="https://github.com/LeapLabTHU/InLine",
        paper="2412.06590",
        license="unspecified",
        **({"input_size": (3, size, size), "pool_size": (side, side)} | fields),
    )


def _deit_cfg(id: str = "", size: int = 224, **fields) -> PretrainedCfg:
    # A column of the class token and the patches.
    return _cfg(id, size, pool_size=(1 + (size // 16) ** 2, 1), **fields)


default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.in1k": _deit_cfg("1d6b8191ad6d4114b291", top1=74.5, gmacs=1.1),
        "inline_deit_small.in1k": _deit_cfg("2f3898b07e9247f3beb3", size=288, top1=80.2, gmacs=5.0, crop_pct=1.0),
        "inline_deit_base.in1k": _deit_cfg("10bdd726d4b0435eb34e", size=448, top1=82.3, gmacs=17.2, crop_pct=1.0),
        "inline_pvt_tiny.in1k": _cfg("90ac52b1555b401eb5e6", top1=78.2, gmacs=2.0),
        "inline_pvt_small.in1k": _cfg("1ab953b2479d433080a3", top1=82.0, gmacs=3.9),
        "inline_pvt_medium.in1k": _cfg("a72aec31e6084bc0a280", top1=83.2, gmacs=6.9),
        "inline_pvt_large.in1k": _cfg("efd91318ba964f01b288", top1=83.6, gmacs=10.2),
        "inline_swin_tiny.in1k": _cfg("32810869fcc34410966b", top1=82.4, gmacs=4.5),
        "inline_swin_small.in1k": _cfg("e9657fd247c04c7cb1a1", top1=83.6, gmacs=8.7),
        "inline_swin_base.in1k": _cfg("bf23564bb64c420aafe1", top1=84.1, gmacs=15.4),
        "inline_swin_base_384.in1k": _cfg(size=384, crop_pct=1.0),
        "inline_cswin_tiny.in1k": _cfg("49fa2ecc543647c4b970", top1=83.2, gmacs=4.3),
        "inline_cswin_small.in1k": _cfg("59f4e65f776f4052b93c", top1=83.8, gmacs=6.8),
        "inline_cswin_base.in1k": _cfg("91e17121df284ae38521", top1=84.5, gmacs=14.9),
        "inline_cswin_base_384.in1k": _cfg(size=384, top1=85.7, gmacs=46.3, crop_pct=1.0),
        "test_inline_deit.untrained": _deit_cfg(size=96),
        "test_inline_pvt.untrained": _cfg(size=96),
        "test_inline_swin.untrained": _cfg(size=96),
        "test_inline_cswin.untrained": _cfg(size=96),
    }
)

_PVT = {"dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "mlp_ratios": (8.0, 8.0, 4.0, 4.0)}
_SWIN_T = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SWIN_S = _SWIN_T | {"depths": (2, 2, 18, 2), "linear_depths": (2, 2, 0, 0)}
_SWIN_B = {
    "dims": (128, 256, 512, 1024),
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
    "linear_depths": (2, 2, 2, 0),
}
_CSWIN_T = {
    "dims": (64, 128, 256, 512),
    "depths": (2, 4, 18, 1),
    "num_heads": (2, 4, 8, 16),
    "linear_depths": (2, 4, 0, 0),
}
_CSWIN_S = _CSWIN_T | {"depths": (3, 6, 29, 2), "linear_depths": (3, 6, 0, 0)}
_CSWIN_B = _CSWIN_S | {"dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}
_TINIEST = {
    "dims": (16, 32, 48, 64),
    "depths": (1, 2, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "mlp_ratios": (2.0,) * 4,
    "img_size": 96,
}


def _create(family: type[nn.Module], variant: str, pretrained: bool, kwargs: dict, **settings) -> nn.Module:
    return build(family, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-T."""
    return _create(InLineDeiT, "inline_deit_tiny", pretrained, kwargs, dims=192, num_heads=6, drop_path_rate=0.1)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-S at 288 px, of 320 channels."""
    return _create(
        InLineDeiT,
        "inline_deit_small",
        pretrained,
        kwargs,
        dims=320,
        num_heads=10,
        img_size=288,
        drop_path_rate=0.1,
    )


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-B at 448 px, of 384 channels."""
    return _create(
        InLineDeiT,
        "inline_deit_base",
        pretrained,
        kwargs,
        dims=384,
        num_heads=12,
        img_size=448,
        drop_path_rate=0.1,
    )


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
    return _create(
        InLineSwin, "inline_swin_tiny", pretrained, kwargs, **_SWIN_T, linear_depths=(2, 2, 6, 0), drop_path_rate=0.2
    )


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-S."""
    return _create(InLineSwin, "inline_swin_small", pretrained, kwargs, **_SWIN_S, drop_path_rate=0.3)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-B."""
    return _create(InLineSwin, "inline_swin_base", pretrained, kwargs, **_SWIN_B, drop_path_rate=0.5)


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-B at 384 px."""
    return _create(InLineSwin, "inline_swin_base_384", pretrained, kwargs, **_SWIN_B, img_size=384, drop_path_rate=0.5)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-T."""
    return _create(InLineCSWin, "inline_cswin_tiny", pretrained, kwargs, **_CSWIN_T, drop_path_rate=0.2)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-S."""
    return _create(InLineCSWin, "inline_cswin_small", pretrained, kwargs, **_CSWIN_S, drop_path_rate=0.4)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-B."""
    return _create(InLineCSWin, "inline_cswin_base", pretrained, kwargs, **_CSWIN_B, drop_path_rate=0.5)


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSwin-B at 384 px."""
    return _create(
        InLineCSWin, "inline_cswin_base_384", pretrained, kwargs, **_CSWIN_B, img_size=384, drop_path_rate=0.7
    )


@register_model
def test_inline_deit(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """Small enough to test everything in seconds."""
    return _create(InLineDeiT, "test_inline_deit", pretrained, kwargs, dims=32, depth=1, num_heads=2, img_size=96)


@register_model
def test_inline_pvt(pretrained: bool = False, **kwargs) -> InLinePVT:
    """Small enough to test everything in seconds."""
    return _create(InLinePVT, "test_inline_pvt", pretrained, kwargs, **_TINIEST)


@register_model
def test_inline_swin(pretrained: bool = False, **kwargs) -> InLineSwin:
    """Small enough to test everything in seconds."""
    return _create(InLineSwin, "test_inline_swin", pretrained, kwargs, **_TINIEST, linear_depths=(1, 2, 0, 0))


@register_model
def test_inline_cswin(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """Small enough to test everything in seconds."""
    return _create(InLineCSWin, "test_inline_cswin", pretrained, kwargs, **_TINIEST, linear_depths=(1, 1, 0, 0))
