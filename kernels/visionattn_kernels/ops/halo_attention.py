"""Halo attention: the queries of a block attend to the keys of the block and of a halo around it.

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + q[i] . (height_rel[jr - ir] + width_rel[jc - ic])) v[j]

Rows ir, jr and columns ic, jc count within the block and within its window; a table's first entry is for the
difference 1 - P. The map is cut into blocks of some keys an axis, and a block with its halo is a window of P keys an
axis. Keys outside the map are zero and take part: their scores are those of the relative position alone, and what they
draw from the softmax is lost. With a stride there is one query to so many keys, and the position of a query within its
block counts queries, not keys. All of this is as in `timm.layers.HaloAttn`, for which there are weights.
Paper: HaloNet (arXiv:2103.12731).

Shapes: B batch, H and W the map, D channels a head, E those of the values, P window; h and w are H and W over stride.
    query: (B, heads, h, w, D)   key: (B, heads, H, W, D)   value: (B, heads, H, W, E)   out: (B, heads, h, w, E)
    height_rel, width_rel: (2P-1, D)      lse: (B, heads, h, w)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn_kernels.cpu import halo_attention as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_filled, check_kind, check_shape
from visionattn_kernels.ops.windows import relative_entries


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
) -> Tensor:
    """The definition, with a copy of every window; also what exporting uses. Arguments as of `halo_attention`."""
    height, width = query.shape[2:4]
    queries, window = block_size // stride, block_size + 2 * halo_size
    below, right = (-length % block_size + halo_size for length in key.shape[2:4])
    entries = relative_entries(queries, window, query.device)
    # i, j are a query's row and column in block (m, n), r and s a key's in its window.
    q = F.pad(query, (0, 0, 0, -width % queries, 0, -height % queries))
    q = q.unflatten(3, (-1, queries)).unflatten(2, (-1, queries))
    k, v = (
        F.pad(x, (0, 0, halo_size, right, halo_size, below)).unfold(2, window, block_size).unfold(3, window, block_size)
        for x in (key, value)
    )
    scores = torch.einsum("bhminjd,bhmndrs->bhminjrs", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + torch.einsum("bhminjd,ird->bhminjr", q, height_rel[entries]).unsqueeze(-1)
    scores = scores + torch.einsum("bhminjd,jsd->bhminjs", q, width_rel[entries]).unsqueeze(-2)
    weights = scores.flatten(-2).softmax(-1).view(scores.shape)
    out = torch.einsum("bhminjrs,bhmners->bhminje", weights, v)
    return out.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Attend from the blocks of a map to their surroundings.

    Args:
        query: (B, heads, h, w, D) any strides; h and w are H and W divided by `stride`, rounded up.
        key: (B, heads, H, W, D). No multiple of `block_size` is needed: the map goes on with zeros.
        value: (B, heads, H, W, E)
        height_rel: Relative positions along the columns, (2P-1, D) with P = block_size + 2 halo_size; trainable.
        width_rel: The same along the rows.
        block_size: Keys of a block along each axis, a multiple of `stride`.
        halo_size: Keys on each side of a block that its queries see too.
        stride: Keys to one query along each axis.
        scale: Factor of the products of queries and keys, by default D ** -0.5. It leaves the relative logits alone.

    Returns:
        (B, heads, h, w, E), a view of (B, h, w, heads, E) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    if halo_size < 0 or stride < 1 or block_size < 1 or block_size % stride:
        raise ValueError(
            "block_size must be a positive multiple of stride, and halo_size not negative, "
            f"got block_size={block_size}, halo_size={halo_size}, stride={stride}"
        )
    _check(query, key, value, stride)
    wanted = (2 * (block_size + 2 * halo_size) - 1, query.shape[-1])
    for name, tensor in (("height_rel", height_rel), ("width_rel", width_rel)):
        check_shape(name, tensor, "(2P-1, D)", wanted)
    check_kind(query=query, key=key, value=value, height_rel=height_rel, width_rel=width_rel)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if wants_plain_aten():
        with no_autocast(query.device.type):
            return reference(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale)
    return _forward(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, stride: int) -> None:
    """Raise ValueError where the maps do not fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_filled(name, tensor, "(B, heads, H, W, D)")
    batch, heads, height, width, dim = key.shape
    lengths = (-(-height // stride), -(-width // stride))
    check_shape("query", query, f"key's shape over stride {stride}", (batch, heads, *lengths, dim))
    check_shape("value", value, "key's shape but for the last axis", (batch, heads, height, width, value.shape[-1]))


def _forward_fake(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale):
    """Shapes, strides and dtypes of the forward's results."""
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    return empty_map(query, dim=value.shape[-1]), lse


def _backward_fake(grad, query, key, value, height_rel, width_rel, out, lse, block_size, halo_size, stride, scale):
    """Shapes, strides and dtypes of the backward's results."""
    return *(empty_map(x) for x in (query, key, value)), *(x.new_empty(x.shape) for x in (height_rel, width_rel))


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor height_rel, Tensor width_rel"
_SETTINGS = "int block_size, int halo_size, int stride, float scale"
_forward = define(
    "halo_attention",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("halo_attention", "forward"),
)
_backward = define(
    "halo_attention_backward",
    f"(Tensor grad, {_TENSORS}, Tensor out, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("halo_attention", "backward"),
)
register_gradient(_forward, _backward, reference, keeps_result=True)
register(Operator("halo_attention", halo_attention, reference, reference))
