"""What Agent Attention and InLine share: trunks of published transformers, of which some blocks get the new attention.

A trunk is a class that says how its stem, downsamples, blocks and softmax attention look; a family passes in its own
attention, one constructor a stage.
"""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from visionattn.backbones._pyramid import Pyramid, Stage
from visionattn.layers import AttentionBlock


class LinearTrunk(Pyramid):
    """Stages whose first blocks have the family's attention and whose others have the trunk's softmax attention.

    Args:
        make_attention: Constructor of the family's attention for each stage, called with the channels and the heads.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        linear_depths: Blocks of each stage, the first ones, that have the family's attention; None for all.
        mlp_ratios: Hidden width of the MLPs of each stage as a multiple of the channels.
        img_size: Side of the images to which the sizes of tables belong. Other images are taken as well.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, by timm's names; "" for none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in attention's output and in the MLPs.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: `linear_depths` does not fit `depths`.
    """

    reductions: ClassVar[Sequence[int]] = (4, 8, 16, 32)
    norm_eps: ClassVar[float] = 1e-5
    make_block: ClassVar[Callable[..., nn.Module]] = AttentionBlock
    make_stage: ClassVar[Callable[..., nn.Module]] = Stage
    make_norm: ClassVar[Callable[..., nn.Module]] = LayerNorm2d

    def __init__(
        self,
        make_attention: Sequence[Callable[..., nn.Module]],
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        linear_depths: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        img_size: int = 224,
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
        img_size = square(img_size)
        linear_depths = depths if linear_depths is None else linear_depths
        if len(linear_depths) != len(depths) or any(n > depth for n, depth in zip(linear_depths, depths, strict=True)):
            raise ValueError(f"linear_depths must be at most depths {tuple(depths)}, got {tuple(linear_depths)}")
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, heads, linear_depth) in enumerate(zip(dims, num_heads, linear_depths, strict=True)):
            side = img_size // self.reductions[i]
            blocks = []
            for j, drop_path in enumerate(drop_paths[i]):
                if j < linear_depth:
                    attn = make_attention[i](dim, heads, proj_drop=proj_drop_rate, **dd)
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
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
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
        elif ".attns.0." in name:
            whole = name.replace(".attns.0.", ".")
            name = next((x for x in (whole, whole.replace(".get_v.", ".dwc.")) if x in wanted), name)
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
        return (
            F.interpolate(moved.flatten(0, -2).unsqueeze(0), shape[axis], mode="linear")
            .view(*moved.shape[:-1], shape[axis])
            .movedim(-1, axis)
            .to(x.dtype)
        )
    if kind == "relative_position_bias_table" and x.shape[1] == shape[1] and isqrt(len(x)) ** 2 == len(x):
        return _resize_square(x.float(), shape[0]).to(x.dtype)
    if kind in ("pos_embed", "token_embed") and (x.shape[0], x.shape[2]) == (shape[0], shape[2]):
        tokens = x.shape[1] - isqrt(x.shape[1]) ** 2
        if tokens != shape[1] - isqrt(shape[1]) ** 2:
            return x
        return torch.cat([x[:, :tokens], _resize_square(x[0, tokens:].float(), shape[1] - tokens)[None].to(x.dtype)], 1)
    return x


def _resize_square(table: Tensor, positions: int) -> Tensor:
    """A table (side * side, C) at another side."""
    old, new = int(len(table) ** 0.5), int(positions**0.5)
    grid = table.T.reshape(1, -1, old, old)
    return F.interpolate(grid, (new, new), mode="bicubic").flatten(2)[0].T
