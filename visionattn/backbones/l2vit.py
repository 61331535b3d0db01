"""L²ViT: a pyramid whose blocks attend in turns to local windows, by softmax, and to the whole map, linearly.

The Linear Attention Resurrection in Vision Transformer (Zheng, arXiv:2501.16182). Checked against ChuanyangZheng/L2ViT
at fad0341. The authors' detectors norm the features by layers of their own, which belong to the detector here.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.checkpoint import translate
from visionattn.layers import DepthwiseConv, pad_to_multiple, zero_pad
from visionattn.registry import build, cfg
from visionattn_kernels import linear_attention


@register_notrace_module  # the size of the map decides the padding, which fx cannot trace
class WindowAttention(nn.Module):
    """Softmax attention inside windows that neither shift nor have a bias (LWA).

    The map is padded with zeros at the bottom and on the right before the projection; padding is attended to.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        window_size: Side of the windows. No weight depends on it.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        size = self.window_size
        rows, columns = -(-height // size), -(-width // size)
        x = zero_pad(x, [0, 0, 0, size * columns - width, 0, size * rows - height])
        # Cut before the projection: a third of the copying.
        windows = x.view(batch, rows, size, columns, size, dim).transpose(2, 3).reshape(-1, size * size, dim)
        query, key, value = _heads(self.qkv(windows), self.num_heads)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, size * size, dim)
        out = self.proj(out).view(batch, rows, columns, size, size, dim).transpose(2, 3)
        return out.reshape(batch, rows * size, columns * size, dim)[:, :height, :width]

    def extra_repr(self) -> str:
        """Settings that no submodule shows."""
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


@register_notrace_module  # the operator checks shapes, which fx cannot trace
class LinearAttention(nn.Module):
    """Linear attention of all tokens to all on ReLU features, with a trainable temperature for each head (LGA).

    The temperatures have the authors' shape (num_heads, 1, 1), so that weight decay reaches them as in their training.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        clamp: Least divisor of the normalisation. No weight depends on it, but the weights were trained with 100.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, clamp: float = 100.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.clamp = clamp
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with softmax attention's scale."""
        nn.init.constant_(self.temperature, (self.proj.in_features // self.num_heads) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        query, key, value = _heads(self.qkv(x).view(batch, height * width, 3 * dim), self.num_heads)
        out = _attend(query, key, value, self.temperature, self.clamp)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim))

    def extra_repr(self) -> str:
        """Settings that no submodule shows."""
        return f"num_heads={self.num_heads}, clamp={self.clamp}"


def _heads(qkv: Tensor, num_heads: int) -> list[Tensor]:
    """Cut (B, N, 3 C) into query, key and value, (B, heads, N, C / heads).

    Cut along the channels, the three gradients join in one copy; as slices of a stack they would be copied twice.
    """
    return [part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


@torch.jit.ignore
def _attend(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor, clamp: float) -> Tensor:
    """Attention on (B, heads, N, D); TorchScript calls back into Python for it."""
    return linear_attention(query, key, value, "division", "relu", scale=temperature.flatten(), epsilon=clamp)


class LocalConcentration(nn.Module):
    """Two depthwise 7x7 convolutions with an activation and a norm between them (LCM). On (B, H, W, dim)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = DepthwiseConv(dim, 7, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = DepthwiseConv(dim, 7, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to the same shape."""
        x = self.act(self.conv1(x))
        return self.conv2(self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Position encoding, attention, something local, MLP, all on residual paths; on (B, H, W, C).

    What is local is a second position encoding in blocks on windows, and local concentration in the others.

    Args:
        dim: Channels C.
        attn: The attention module, (B, H, W, C) to the same shape.
        windowed: Whether it attends to windows.
        mlp_ratio: Hidden width of the MLP as a multiple of `dim`.
        drop_path: Probability that a sample skips a residual path in training; position encodings are never skipped.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        windowed: bool,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_embed1 = DepthwiseConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.pos_embed2 = DepthwiseConv(dim, 3, **dd) if windowed else None
        self.norm3 = None if windowed else nn.LayerNorm(dim, **dd)
        self.local = None if windowed else LocalConcentration(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = x + self.pos_embed1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.pos_embed2 is not None:
            x = x + self.pos_embed2(x)
        if self.local is not None:
            x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module  # the size of the map decides the padding, which fx cannot trace
class ConvStem(nn.Module):
    """Two strided convolutions and a norm: (B, in_chans, H, W) to (B, dim, H/4, W/4), after padding with zeros."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image to the first stage's input."""
        x = self.act(self.norm1(self.conv1(pad_to_multiple(x, 4))))
        return self.norm(self.norm2(self.conv2(x)))


@register_notrace_module  # the size of the map decides the padding, which fx cannot trace
class PatchMerging(nn.Module):
    """A norm, then a convolution of 2x2 patches: (B, in_dim, H, W) to (B, dim, H/2, W/2), after padding with zeros."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(in_dim, eps=1e-5, **dd)
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.proj(pad_to_multiple(self.norm(x), 2))


class L2ViT(Pyramid):
    """L²ViT. Blocks attend to windows and to the whole map in turns, beginning with windows in every stage.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_size: Side of the windows; no weight depends on it.
        clamp: Least divisor of linear attention; no weight depends on it, but the weights were trained with 100.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `window_size` or `clamp` is not positive.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        clamp: float = 100.0,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        if window_size < 1 or clamp <= 0:
            raise ValueError(f"window_size and clamp must be positive, got {window_size} and {clamp}")
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = [
                Block(dim, LinearAttention(dim, heads, clamp, **dd), False, mlp_ratio, drop_path, **dd)
                if j % 2
                else Block(dim, WindowAttention(dim, heads, window_size, **dd), True, mlp_ratio, drop_path, **dd)
                for j, drop_path in enumerate(drop_paths[i])
            ]
            stages.append(Stage(dim, PatchMerging(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            ConvStem(in_chans, dims[0], **dd),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5, **dd),
            (4, 8, 16, 32),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew, linear layers and convolutions from a truncated normal of deviation 0.02."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours; our own checkpoints pass unchanged.

    The norms of the features that files of the authors' detectors hold belong to the detector.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    stem = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
    rules = [
        *((rf"^downsample_layers\.0\.proj\.proj\.{i}\.", f"stem.{name}.") for i, name in stem.items()),
        (r"^downsample_layers\.0\.norm\.", "stem.norm."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.cpe\.0\.proj\.", ".pos_embed1."),
        (r"\.cpe\.1\.proj\.", ".pos_embed2."),
        (r"\.local_mp\.", ".local."),
        (r"^head\.", "head.fc."),
    ]
    return translate(state_dict, model, rules, drop=r"^norm\d\.", free=("head.fc.", "norm."))


_RELEASE = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-{}.pth"


def _cfg(file: str = "", **fields) -> PretrainedCfg:
    return cfg(
        url=_RELEASE.format(file) if file else "",
        source="https://github.com/ChuanyangZheng/L2ViT",
        paper="2501.16182",
        license="mit",
        **({"first_conv": "stem.conv1"} | fields),
    )


default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny.in1k": _cfg("Tiny-checkpoint-best-ema", top1=83.1, params=28596781, gmacs=4.7),
        "l2vit_small.in1k": _cfg("Small-checkpoint-best-ema", top1=84.1, params=50199157, gmacs=9.0),
        "l2vit_base.in22k_ft_in1k": _cfg(
            "Base-22k21k-finetune-224-checkpoint-best", top1=86.0, params=88577188, gmacs=15.9
        ),
        "l2vit_base.in1k": _cfg("Base-checkpoint-best-ema", top1=84.4, params=88577188, gmacs=15.9),
        # Its 21,841 classes are in the authors' own order.
        "l2vit_base.in22k": _cfg("Base-22k-pretrain-checkpoint-best", num_classes=21841),
        "l2vit_base_384.in22k_ft_in1k": _cfg(
            "Base-22k21k-finetune-384-checkpoint-best",
            top1=87.0,
            params=88577188,
            gmacs=47.5,
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
            crop_mode="squash",
        ),
        "test_l2vit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> L2ViT:
    return build(L2ViT, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


_BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs) -> L2ViT:
    """L²ViT-T."""
    return _create("l2vit_tiny", pretrained, kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs) -> L2ViT:
    """L²ViT-S."""
    return _create("l2vit_small", pretrained, kwargs, depths=(2, 2, 18, 2))


@register_model
def l2vit_base(pretrained: bool = False, **kwargs) -> L2ViT:
    """L²ViT-B, trained with a stochastic depth of 0.3 on ImageNet-1k."""
    return _create("l2vit_base", pretrained, kwargs, **_BASE, drop_path_rate=0.3)


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs) -> L2ViT:
    """L²ViT-B with windows of 12x12, fine-tuned at 384 px with a stochastic depth of 0.2."""
    return _create("l2vit_base_384", pretrained, kwargs, **_BASE, window_size=12, drop_path_rate=0.2)


@register_model
def test_l2vit(pretrained: bool = False, **kwargs) -> L2ViT:
    """An L²ViT small enough to test everything in seconds."""
    settings = {"dims": (16, 32, 48, 64), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
    return _create("test_l2vit", pretrained, kwargs, **settings)
