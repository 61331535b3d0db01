"""MALA: a pyramid on linear attention that minds the magnitude of its queries, then on softmax attention.

Rectifying Magnitude Neglect in Linear Attention (Fan et al., ICCV 2025, arXiv:2507.00698); the models are its MAViT.
Checked against qhfan/MALA at 7114e63, from which the layout differs: maps are (B, H, W, C) in blocks, where 1x1
convolutions are linear layers, and a stage begins with the downsample that ends the previous one there. The authors'
detectors norm the features by layers of their own, which belong to the detector here.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.checkpoint import translate
from visionattn.layers import DepthwiseConv
from visionattn.registry import build, cfg
from visionattn_kernels import linear_attention


def rotary_table(height: int, width: int, dim: int, device=None) -> Tensor:
    """Cosines and sines (2, H W, dim / 2) by which position (row, column) turns the pairs of channels of a head.

    The first half of the pairs turns with the row, the second with the column, by angles from 1 down to 1e-4 a step.

    Args:
        height: Rows H of the map.
        width: Columns W of the map.
        dim: Channels of a head, a multiple of 4.
        device: Where the table shall live.
    """
    angles = 10000.0 ** -torch.linspace(0, 1, dim // 4, device=device)
    rows = (torch.arange(height, device=device)[:, None] * angles)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width, device=device)[:, None] * angles).expand(height, -1, -1)
    turns = torch.cat([rows, columns], -1).flatten(0, 1)
    return torch.stack([turns.cos(), turns.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channels 2c and 2c + 1 of (B, heads, N, D) by the angles of `rotary_table`."""
    (cos, sin), (first, second) = rotary.to(x.dtype).unbind(0), x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


@register_notrace_module  # the size of the map decides the angles, which fx cannot trace
class RotaryAttention(nn.Module):
    """Attention of all tokens to all, of rotated queries and keys, gated.

    A depthwise convolution of the values (LePE) is added to the result, and the sum multiplied by a fourth projection
    without an activation.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple of four times as many.
        linear: Whether the attention is magnitude-aware linear attention, or else softmax attention.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, linear: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.linear = linear
        self.qkvo = nn.Linear(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        query, key, value, gate = self.qkvo(x).chunk(4, -1)
        q, k, v = (
            y.reshape(batch, height * width, self.num_heads, dim // self.num_heads).transpose(1, 2)
            for y in (query, key, value)
        )
        out = _attend(q, k, v, height, width, self.linear).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj((out + self.lepe(value)) * gate)

    def extra_repr(self) -> str:
        """Settings that no submodule shows."""
        return f"num_heads={self.num_heads}, linear={self.linear}"


@torch.jit.ignore
def _attend(query: Tensor, key: Tensor, value: Tensor, height: int, width: int, linear: bool) -> Tensor:
    """Attention on (B, heads, N, D); TorchScript calls back into Python for it."""
    rotary = rotary_table(height, width, query.shape[-1], query.device)
    if linear:
        return linear_attention(query, key, value, "magnitude", "elu_plus_one", rotary=rotary, epsilon=1e-6)
    return F.scaled_dot_product_attention(rotate(query, rotary), rotate(key, rotary), value)


class ConvMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution, and a residual around it, after the activation. On (B, H, W, dim)."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to the same shape."""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Position encoding, attention and MLP on residual paths, the last two normed before and scaled by channel.

    The scales have the authors' shape (1, dim, 1, 1), so that weight decay reaches them as in the authors' training.

    Args:
        dim: Channels C.
        attn: The attention module, (B, H, W, C) to the same shape.
        mlp_ratio: Hidden width of the MLP as a multiple of `dim`.
        layer_scale: Initial value of the scales.
        drop_path: Probability that a sample skips a residual path in training.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.pos_embed = DepthwiseConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.gamma_1 = nn.Parameter(torch.empty(1, dim, 1, 1, **dd))
        self.gamma_2 = nn.Parameter(torch.empty(1, dim, 1, 1, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with residual paths that count as much as the family's variant wants."""
        nn.init.constant_(self.gamma_1, self.layer_scale)
        nn.init.constant_(self.gamma_2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.gamma_1.flatten() * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2.flatten() * self.mlp(self.norm2(x)))


class ConvStem(nn.Module):
    """Four convolutions, two of them strided: (B, in_chans, H, W) to (B, dim, H/4, W/4), odd sides rounded up."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims, strides = (in_chans, dim // 2, dim // 2, dim // 2, dim), (2, 1, 1, 2)
        layers = []
        for i, stride in enumerate(strides):
            layers += [
                nn.Conv2d(dims[i], dims[i + 1], 3, stride, 1, **dd),
                nn.BatchNorm2d(dims[i + 1], **dd),
                nn.GELU(),
            ]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Image to the first stage's input."""
        return self.proj(x)


class ConvDownsample(nn.Module):
    """A strided convolution and a norm: (B, in_dim, H, W) to (B, dim, H/2, W/2), odd sides rounded up."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.norm(self.reduction(x))


class ProjectionHead(ClassifierHead):
    """A 1x1 convolution, a norm and an activation before timm's pooling and classifier.

    Args:
        in_features: Channels of the map (B, C, H, W).
        projection: Channels after the convolution, those of the features before the classifier.
        num_classes: Classes; 0 for no classifier.
        pool_type: Pooling, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        projection: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(projection, num_classes, pool_type, drop_rate, **dd)
        self.proj = nn.Conv2d(in_features, projection, 1, **dd)
        self.norm = nn.BatchNorm2d(projection, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify (B, C, H, W), or with `pre_logits` only project and pool."""
        x = self.drop(self.global_pool(self.act(self.norm(self.proj(x)))))
        return x if pre_logits else self.fc(x)


class MALA(Pyramid):
    """MALA, or MAViT: linear attention in the first two stages, softmax attention in the last two.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        linear: Whether each stage has magnitude-aware linear attention, or else softmax attention.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        layer_scales: Initial value of the residual paths' scales, of each stage.
        projection: Channels between the last stage and the classifier.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: The channels of a head cannot be turned by rows and columns.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        linear: Sequence[bool] = (True, True, False, False),
        mlp_ratio: float = 3.5,
        layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 2048,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % (4 * heads):
                raise ValueError(f"dims must be multiples of four times num_heads, got {dim} channels, {heads} heads")
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                Block(
                    dim,
                    RotaryAttention(dim, num_heads[i], linear[i], **dd),
                    mlp_ratio,
                    layer_scales[i],
                    drop_path,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            stages.append(Stage(dim, ConvDownsample(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            ConvStem(in_chans, dims[0], **dd),
            stages,
            nn.Identity(),
            (4, 8, 16, 32),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            head=ProjectionHead(dims[-1], projection, num_classes, global_pool, drop_rate, **dd),
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

    Files of the authors' detectors have no head; their norms of the features belong to the detector.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    rules = [
        (r"^proj\.", "head.proj."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"^patch_embed\.", "stem."),
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
        (r"^layers\.", "stages."),
        (r"\.(norm\d)\.norm\.", r".\1."),
        (r"\.ffn\.", ".mlp."),
        (r"\.pos\.", ".pos_embed."),
    ]
    drop = r"^extra_norms\.|\.RoPE\.angle$"
    return translate(state_dict, model, rules, drop=drop, adapt=_flatten_pointwise, free=("head.",))


def _flatten_pointwise(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' 1x1 convolutions as those of linear layers, where the model has these."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: x.flatten(1) if name in linear and x.ndim == 4 else x for name, x in state_dict.items()}


def _cfg(letter: str = "", **fields) -> PretrainedCfg:
    # The authors link their repository on the hub without naming its files; those of a size have its letter in them.
    hub = {"hf_hub_id": "aldjalkdf/MAViT", "hf_hub_filename": f"*[-_]{letter}*.pth"} if letter else {}
    return cfg(
        source="https://github.com/qhfan/MALA",
        paper="2507.00698",
        license="unspecified",
        first_conv="stem.proj.0",
        **hub,
        **fields,
    )


default_cfgs = generate_default_cfgs(
    {
        "mala_tiny.in1k": _cfg("t", top1=82.9, params=16449128, gmacs=2.5),
        "mala_small.in1k": _cfg("s", top1=84.7, params=27142568, gmacs=4.6),
        "mala_base.in1k": _cfg("b", top1=85.7, params=49792648, gmacs=9.9),
        "mala_large.in1k": _cfg("l", top1=86.0, params=97766088, gmacs=16.1),
        "test_mala.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> MALA:
    return build(MALA, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def mala_tiny(pretrained: bool = False, **kwargs) -> MALA:
    """MAViT-T."""
    return _create("mala_tiny", pretrained, kwargs, drop_path_rate=0.1)


@register_model
def mala_small(pretrained: bool = False, **kwargs) -> MALA:
    """MAViT-S."""
    settings = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create("mala_small", pretrained, kwargs, **settings, drop_path_rate=0.15)


@register_model
def mala_base(pretrained: bool = False, **kwargs) -> MALA:
    """MAViT-B."""
    settings = {"dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "num_heads": (1, 2, 6, 8)}
    return _create("mala_base", pretrained, kwargs, **settings, layer_scales=(1.0, 1.0, 1e-6, 1e-6), drop_path_rate=0.4)


@register_model
def mala_large(pretrained: bool = False, **kwargs) -> MALA:
    """MAViT-L."""
    settings = {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (1, 2, 7, 10), "projection": 2560}
    return _create("mala_large", pretrained, kwargs, **settings, layer_scales=(1e-6,) * 4, drop_path_rate=0.55)


@register_model
def test_mala(pretrained: bool = False, **kwargs) -> MALA:
    """A MALA small enough to test everything in seconds."""
    settings = {"dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4), "projection": 128}
    return _create("test_mala", pretrained, kwargs, **settings)
