"""BiFormer: a pyramid whose tokens attend to the few regions of the map that fit their own region.

BiFormer: Vision Transformer with Bi-Level Routing Attention (Zhu et al., CVPR 2023, arXiv:2303.08810). Checked against
rayleizhu/BiFormer at 1697bbb, its "legacy" attention with the released models' settings: keys and values are not
downsampled, routing has no parameters and no gradient. Maps that the regions do not divide are padded, as the authors
do for detection and segmentation; their classifier refuses them, as ours does with `auto_pad=False`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import PretrainedCfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.checkpoint import translate
from visionattn.layers import AttentionBlock, DepthwiseConv, fill_patch, zero_pad
from visionattn.registry import build, cfg
from visionattn_kernels import region_routes, routed_attention

LEPE_KERNEL = 5


@register_notrace_module  # the size of the map decides the padding and the regions, which fx cannot trace
class RoutingAttention(nn.Module):
    """Bi-level routing attention: regions choose regions, then tokens attend to the tokens of those chosen.

    The map is cut into n_win x n_win regions, padded with zeros at the bottom and on the right before the projection
    where they do not fit; padding takes part in the choice and is attended to. The position enters through a depthwise
    convolution of the values (LePE), added to the result.

    Args:
        dim: Channels C.
        num_heads: Heads; `dim` must be a multiple.
        n_win: Regions along each axis. No weight depends on it, so it may be set later.
        topk: Regions that each region attends to. Likewise.
        auto_pad: Whether maps that `n_win` does not divide are padded, or refused. Likewise.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, num_heads: int, n_win: int = 7, topk: int = 4, auto_pad: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.auto_pad = auto_pad
        # The authors scale by the width of all heads together.
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv(dim, LEPE_KERNEL, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape.

        Raises:
            ValueError: `n_win` does not divide H and W, and padding is off.
        """
        batch, height, width, dim = x.shape
        n = self.n_win
        if not self.auto_pad and (height % n or width % n):
            raise ValueError(
                f"without auto_pad the map's height and width must be multiples of {n}, got {height}x{width}"
            )
        rows, columns = -(-height // n), -(-width // n)
        x = zero_pad(x, [0, 0, 0, n * columns - width, 0, n * rows - height])
        # Cut before the projection: a third of the copying.
        regions = x.view(batch, n, rows, n, columns, dim).transpose(2, 3).reshape(batch, n * n, rows * columns, dim)
        qkv = self.qkv(regions).view(batch, n * n, rows * columns, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)
        out = _route(query, key, value, self.topk, self.scale)
        out, value = (y.permute(0, 2, 3, 1, 4).reshape(batch, n, n, rows, columns, dim) for y in (out, value))
        out, value = (y.transpose(2, 3).reshape(batch, n * rows, n * columns, dim) for y in (out, value))
        return self.proj((out + self.lepe(value))[:, :height, :width])

    def extra_repr(self) -> str:
        """Settings that no submodule shows."""
        return f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, auto_pad={self.auto_pad}"


@torch.jit.ignore
def _route(query: Tensor, key: Tensor, value: Tensor, topk: int, scale: float) -> Tensor:
    """Choose regions and attend to them; TorchScript calls back into Python for it."""
    return routed_attention(query, key, value, region_routes(query, key, topk), scale)


class LePEAttention(nn.Module):
    """Attention of all tokens to all, with a depthwise convolution of the input added: BiFormer's last stage.

    Args:
        dim: Channels C.
        num_heads: Heads; eight in every released model, whatever the width.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = DepthwiseConv(dim, LEPE_KERNEL, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim) + self.lepe(x))


class ConvStem(nn.Module):
    """Two strided convolutions: (B, in_chans, H, W) to (B, dim, H/4, W/4), odd sides rounded up."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image to the first stage's input."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class ConvNorm(nn.Module):
    """A strided convolution and a norm, in this order or the other: (B, in_dim, H, W) to (B, dim, H/s, W/s).

    Where kernel and stride are the same, what does not fill a patch is left out, as the authors do; a map smaller than
    one patch is padded with zeros. Otherwise odd sides are rounded up.
    """

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, stride: int, norm_first: bool = False, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_first = norm_first
        self.patch_size = stride if kernel_size == stride else 1
        padding = 0 if kernel_size == stride else kernel_size // 2
        self.norm = nn.BatchNorm2d(in_dim if norm_first else dim, **dd)
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the map."""
        if self.norm_first:
            x = self.norm(x)
        x = self.conv(fill_patch(x, self.patch_size))
        return x if self.norm_first else self.norm(x)


class BiFormer(Pyramid):
    """BiFormer, or its ablation in Swin's layout (STL).

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        topk: Regions to attend to, of each stage; None for attention to all tokens.
        n_win: Regions along each axis.
        auto_pad: Whether maps that the regions do not divide are padded, which lets images of any size in; the authors'
            detectors and segmenters have it on, their classifiers off, which then refuse such images.
        head_dim: Channels of a head in the stages with regions.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        swin_layout: Patch convolutions in place of overlapping ones, and no position encoding before attention.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `topk` does not fit the stages or the regions.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        topk: Sequence[int | None] = (1, 4, 16, None),
        n_win: int = 7,
        auto_pad: bool = True,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, regions) in enumerate(zip(dims, topk, strict=True)):
            blocks = [
                AttentionBlock(
                    dim,
                    LePEAttention(dim, **dd) if regions is None else RoutingAttention(dim, dim // head_dim, **dd),
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_path,
                    norm_eps=1e-6,
                    pos_embed=None if swin_layout else DepthwiseConv(dim, 3, **dd),
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            kernel_size = 2 if swin_layout else 3
            halve = ConvNorm(dims[i - 1], dim, kernel_size, 2, norm_first=swin_layout, **dd) if i else nn.Identity()
            stages.append(Stage(dim, halve, blocks))
        super().__init__(
            ConvNorm(in_chans, dims[0], 4, 4, **dd) if swin_layout else ConvStem(in_chans, dims[0], **dd),
            stages,
            nn.BatchNorm2d(dims[-1], **dd),
            (4, 8, 16, 32),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.set_regions(n_win, topk, auto_pad)

    @torch.jit.ignore
    def set_regions(
        self, n_win: int | None = None, topk: Sequence[int | None] | None = None, auto_pad: bool | None = None
    ) -> None:
        """Choose the regions anew; no weight depends on them. The authors use n_win 16 on COCO and 8 on ADE20K.

        Args:
            n_win: Regions along each axis; None leaves them as they are.
            topk: Regions to attend to, of each stage, None for a stage that attends to all tokens; None as a whole
                leaves them as they are.
            auto_pad: Whether maps that the regions do not divide are padded, or refused; None leaves it as it is.

        Raises:
            ValueError: `topk` does not fit the stages or the regions.
        """
        routed = [[block.attn for block in stage.blocks if hasattr(block.attn, "topk")] for stage in self.stages]
        wanted = [attns[0].topk if attns else None for attns in routed] if topk is None else list(topk)
        if [number is not None for number in wanted] != [bool(attns) for attns in routed]:
            raise ValueError(f"topk must be a number for each of {len(routed)} stages with regions, got {topk}")
        for attns, number in zip(routed, wanted, strict=True):
            for attn in attns:
                windows = attn.n_win if n_win is None else n_win
                if windows < 1 or not 1 <= number <= windows**2:
                    raise ValueError(f"topk must be between 1 and n_win ** 2, got topk={number}, n_win={windows}")
                attn.n_win, attn.topk = windows, number
                attn.auto_pad = attn.auto_pad if auto_pad is None else auto_pad


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Map the authors' names to ours; our own checkpoints pass unchanged.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    swin = isinstance(model.stem, ConvNorm)
    stem = {"0": "conv", "1": "norm"} if swin else {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
    downsample = {"0": "norm", "1": "conv"} if swin else {"0": "conv", "1": "norm"}
    rules = [
        *((rf"^downsample_layers\.0\.{i}\.", f"stem.{name}.") for i, name in stem.items()),
        *((rf"^downsample_layers\.(\d)\.{i}\.", rf"stages.\1.downsample.{x}.") for i, x in downsample.items()),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
        (r"\.attn\.wo\.", ".attn.proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ]
    # Detectors and segmenters norm the features with norms of their own.
    return translate(state_dict, model, rules, drop=r"^extra_norms\.")


def _cfg(share: str = "", **fields) -> PretrainedCfg:
    return cfg(
        # The authors' shares on OneDrive; their users report them dead.
        page=share and f"https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvCh{share}/root/content",
        dead=True,
        source="https://github.com/rayleizhu/BiFormer",
        paper="2303.08810",
        license="mit",
        **({"first_conv": "stem.conv1", "crop_pct": 0.9} | fields),
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg("HEOoGkgwgQzEDlM", top1=81.4, params=13142760, gmacs=2.2),
        "biformer_small.in1k": _cfg("HDyM-x9KWRBZ832", top1=83.8, params=25536232, gmacs=4.5),
        "biformer_base.in1k": _cfg("HI_XPhoadjaNxtO", top1=84.3, params=56804968, gmacs=9.8),
        "biformer_stl.in1k": _cfg("Sf-m7ujkvx9lIQ1", top1=82.7, params=28372552, gmacs=4.6, first_conv="stem.conv"),
        "test_biformer.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_biformer_stl.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), first_conv="stem.conv"),
    }
)

_TINIEST = {"dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1), "head_dim": 16, "n_win": 3, "topk": (1, 2, 4, None)}


def _create(variant: str, pretrained: bool, kwargs: dict, **settings) -> BiFormer:
    return build(BiFormer, variant, pretrained, checkpoint_filter_fn, **(settings | kwargs))


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-Tiny."""
    return _create("biformer_tiny", pretrained, kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-Small."""
    return _create("biformer_small", pretrained, kwargs, depths=(4, 4, 18, 4), drop_path_rate=0.15)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-Base."""
    return _create("biformer_base", pretrained, kwargs, dims=(96, 192, 384, 768), depths=(4, 4, 18, 4))


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer in Swin-Tiny's layout."""
    settings = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "mlp_ratio": 4.0, "drop_path_rate": 0.1}
    return _create("biformer_stl", pretrained, kwargs, **settings, swin_layout=True)


@register_model
def test_biformer(pretrained: bool = False, **kwargs) -> BiFormer:
    """A BiFormer small enough to test everything in seconds."""
    return _create("test_biformer", pretrained, kwargs, **_TINIEST)


@register_model
def test_biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """A BiFormer in Swin's layout small enough to test everything in seconds."""
    return _create("test_biformer_stl", pretrained, kwargs, **_TINIEST, swin_layout=True)
