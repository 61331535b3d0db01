"""What Agent Attention and InLine share: trunks of published transformers, of which some blocks get the new attention.

A trunk is a class that says how its stem, downsamples, blocks and softmax attention look; a family says in a subclass
how its own attention does.
"""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple
from timm.models import PretrainedCfg
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.layers import AttentionBlock
from visionattn.registry import cfg

TINIEST = {"dims": (16, 32, 48, 64), "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "mlp_ratios": (2.0,) * 4}


class LinearTrunk(Pyramid):
    """Stages whose first blocks have the family's attention and whose others have the trunk's softmax attention.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        linear_depths: Blocks of each stage, the first ones, that have the family's attention; None for all.
        mlp_ratios: Hidden width of the MLPs of each stage as a multiple of the channels.
        img_size: Side of the images to which the sizes of tables belong. Other images are taken as well.
        in_chans: Channels of the image.
        proj_drop_rate: Dropout in attention's output and in the MLPs.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        attention_settings: Further arguments of the family's attention at each stage; None for none.
        device: Where the parameters live.
        dtype: Type of the parameters.
        **kwargs: As of `Pyramid`: the classes, the pooling and the dropout before the classifier.

    Raises:
        ValueError: `linear_depths` does not fit `depths`, or `img_size` is not square or leaves the last stage no map.
    """

    attention: ClassVar[Callable[..., nn.Module]]
    rules: ClassVar[Sequence[tuple[str, str]]]
    reductions: ClassVar[Sequence[int]] = (4, 8, 16, 32)
    norm_eps: ClassVar[float] = 1e-5
    make_block: ClassVar[Callable[..., nn.Module]] = AttentionBlock
    make_stage: ClassVar[Callable[..., nn.Module]] = Stage
    make_norm: ClassVar[Callable[..., nn.Module]] = LayerNorm2d

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        linear_depths: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        img_size: int = 224,
        in_chans: int = 3,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_settings: Sequence[dict] | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd = {"device": device, "dtype": dtype}
        img_size = square(img_size)
        if img_size < max(self.reductions):
            raise ValueError(f"img_size must be at least {max(self.reductions)}, got {img_size}")
        linear_depths = depths if linear_depths is None else linear_depths
        if len(linear_depths) != len(depths) or any(n > depth for n, depth in zip(linear_depths, depths, strict=True)):
            raise ValueError(f"linear_depths must be at most depths {tuple(depths)}, got {tuple(linear_depths)}")
        extra = [{}] * len(depths) if attention_settings is None else attention_settings
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, heads, linear_depth) in enumerate(zip(dims, num_heads, linear_depths, strict=True)):
            side = img_size // self.reductions[i]
            blocks = []
            for j, drop_path in enumerate(drop_paths[i]):
                if j < linear_depth:
                    attn = self.attention(dim, heads, proj_drop=proj_drop_rate, **extra[i], **dd)
                else:
                    attn = self.make_softmax(i, j, dim, heads, img_size, proj_drop=proj_drop_rate, **dd)
                settings = {"mlp_ratio": mlp_ratios[i], "proj_drop": proj_drop_rate, "drop_path": drop_path}
                blocks.append(self.make_block(dim, attn, **settings, norm_eps=self.norm_eps, **dd))
            downsample = self.make_downsample(dims[i - 1], dim, side, **dd) if i else nn.Identity()
            stages.append(self.make_stage(dim, downsample, blocks))
        super().__init__(
            self.make_stem(in_chans, dims[0], img_size // self.reductions[0], **dd),
            stages,
            self.make_norm(dims[-1], eps=self.norm_eps, **dd),
            self.reductions,
            in_chans=in_chans,
            **dd,
            **kwargs,
        )


def trunk_cfg(id: str = "", size: int = 224, tokens: bool = False, crop: bool = True, **fields) -> PretrainedCfg:
    """An entry for weights on a share page of the authors of both families.

    They warp images to squares, of which a margin is cropped.

    Args:
        id: The page's; "" for none.
        size: Side of the images in pixels.
        tokens: Whether the model is DeiT, whose final map is a column of the class token and the patches.
        crop: Whether the margin is cropped.
        **fields: As of `registry.cfg`.
    """
    return cfg(
        page=id and f"https://cloud.tsinghua.edu.cn/f/{id}/?dl=1",
        license="unspecified",
        input_size=(3, size, size),
        pool_size=(1 + (size // 16) ** 2, 1) if tokens else (size // 32, size // 32),
        crop_pct=0.875 if crop else 1.0,
        crop_mode="squash",
        **fields,
    )


def square(img_size: int | Sequence[int]) -> int:
    """The side of an image that may be given by both sides.

    Raises:
        ValueError: The image is not square.
    """
    sides = to_2tuple(img_size)
    if sides[0] != sides[1]:
        raise ValueError(f"img_size must be square, since the authors' tables are, got {img_size}")
    return sides[0]


def adapt(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring renamed tensors of the authors into our shapes, and tables of another image size to the model's.

    PVT's projections are joined, a branch of CSWin that covers the whole map loses its number. Relative biases and
    position embeddings are resized bicubically, the agents' biases of rows and columns linearly, as the authors do.
    """
    wanted, adapted = model.state_dict(), {}
    for name, x in state_dict.items():
        if name.endswith((".attn.q.weight", ".attn.q.bias")):
            other = state_dict.get(name.replace(".q.", ".kv."))
            name = name.replace(".q.", ".qkv.")
            if other is not None and x.ndim and other.shape[1:] == x.shape[1:] and other.ndim == x.ndim:
                x = torch.cat([x, other])
        elif ".attn.kv." in name:
            continue
        elif ".attns." in name:
            ours = (".attns.0.", "."), (".get_v.", "."), (".attns.0.get_v.", ".dwc.")
            name = next((x for x in (name.replace(*pair) for pair in ours) if x in wanted), name)
        if name.endswith(("h_bias", "w_bias", ".ha_bias", ".wa_bias")) and x.ndim == 5:
            # Without the axis of the batch, since torch cannot bring five axes into channels_last.
            x = x[0]
        if name in wanted and x.shape != wanted[name].shape and x.ndim == wanted[name].ndim and x.numel():
            x = _resize(name.rsplit(".", 1)[-1], x, wanted[name].shape)
        adapted[name] = x
    return adapted


def _resize(kind: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The table `x` in `shape` where only its size in positions differs; as it is otherwise."""
    axes = {"ah_bias": 2, "aw_bias": 3, "ha_bias": 1, "wa_bias": 2}
    if kind in axes:
        axis = axes[kind]
        if [n for i, n in enumerate(x.shape) if i != axis] != [n for i, n in enumerate(shape) if i != axis]:
            return x
        moved = x.float().movedim(axis, -1)
        resized = F.interpolate(moved.flatten(0, -2).unsqueeze(0), shape[axis], mode="linear")
        return resized.view(*moved.shape[:-1], shape[axis]).movedim(-1, axis).to(x.dtype)
    if kind == "relative_position_bias_table" and x.shape[1] == shape[1] and isqrt(len(x)) ** 2 == len(x):
        return resample_abs_pos_embed(x[None], [isqrt(shape[0])] * 2, num_prefix_tokens=0, antialias=False)[0]
    if kind in ("pos_embed", "token_embed") and (x.shape[0], x.shape[2:]) == (shape[0], shape[2:]):
        tokens = int(kind == "token_embed")
        if isqrt(x.shape[1] - tokens) ** 2 == x.shape[1] - tokens:
            return resample_abs_pos_embed(x, [isqrt(shape[1])] * 2, num_prefix_tokens=tokens, antialias=False)
    return x
