"""What each operator is measured against: the formulation that its papers' code or a newcomer would write, and shapes.

Baselines take the arguments of the operator, support autograd, and are compared with the reference by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn_kernels.ops.windows import window_offsets
from visionattn_kernels.testing import Case, aggregate, flow, halo, linear, neighborhood, routed


@lru_cache(maxsize=16)
def _neighbors(shape: tuple[int, int], kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Positions (H W, K²) of the keys of every query, and their entries of the flattened relative bias."""
    rows, columns = (window_offsets(length, kernel_size, 1, dilation) for length in shape)
    (row, bias_row), (column, bias_column) = (
        ((offsets >= 0).nonzero()[:, 1].view(-1, kernel_size), offsets[offsets >= 0].view(-1, kernel_size))
        for offsets in (rows, columns)
    )
    position = row[:, None, :, None] * shape[1] + column[None, :, None, :]
    entry = bias_row[:, None, :, None] * (2 * kernel_size - 1) + bias_column[None, :, None, :]
    return position.reshape(shape[0] * shape[1], -1), entry.reshape(shape[0] * shape[1], -1)


def gathered_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention by copying the K² keys and values of every query, `key[:, :, index]`."""
    height, width, dim = query.shape[2:]
    position, entry = _neighbors((height, width), kernel_size, dilation)
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    scores = (q.unsqueeze(3) * dim**-0.5 @ k[:, :, position].transpose(-2, -1)).squeeze(3)
    if bias is not None:
        scores = scores + bias.flatten(1)[:, entry]
    return (scores.softmax(-1).unsqueeze(3) @ v[:, :, position]).squeeze(3).view(query.shape)


def gathered_neighborhood_aggregate(weights: Tensor, value: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """Neighborhood aggregate by copying the K² values of every query, `value[:, :, index]`."""
    position, _ = _neighbors(tuple(value.shape[2:4]), kernel_size, dilation)
    neighbors = value.flatten(2, 3)[:, :, position]
    return (weights.flatten(2, 3).unsqueeze(3) @ neighbors).squeeze(3).view(value.shape)


def gathered_routed_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float | None = None
) -> Tensor:
    """Routed attention as BiFormer's code does it: `gather` from what is expanded to every region.

    The authors gather keys and values at once, which are one tensor there; two gathers move as much.
    """
    batch, heads, regions, tokens, dim = query.shape
    count = routes.shape[2]
    index = routes.view(batch, regions, count, 1, 1).expand(-1, -1, -1, tokens, heads * dim)
    everywhere = (x.permute(0, 2, 3, 1, 4).flatten(3)[:, None].expand(-1, regions, -1, -1, -1) for x in (key, value))
    k, v = (x.gather(2, index).view(batch * regions, count * tokens, heads, dim) for x in everywhere)
    q = query.permute(0, 2, 1, 3, 4).reshape(batch * regions, heads, tokens, dim)
    scores = (q * (dim**-0.5 if scale is None else scale)) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).view(batch, regions, heads, tokens, dim).transpose(1, 2)


def unfolded_halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
) -> Tensor:
    """Halo attention as timm does it: all windows unfolded from padded keys and values, relative logits shifted."""
    batch, heads, height, width, dim = query.shape
    rows, columns, window = height // block_size, width // block_size, block_size + 2 * halo_size
    q = query.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).transpose(3, 4).flatten(0, 3)
    pairs = F.pad(torch.cat([key, value], -1), (0, 0, *(halo_size,) * 4))
    windows = pairs.unfold(2, window, block_size).unfold(3, window, block_size)
    k, v = windows.reshape(len(q), -1, window**2).transpose(1, 2).split([dim, value.shape[-1]], -1)
    by_column = _shifted(q @ width_rel.t()).unsqueeze(-2)
    by_row = _shifted(q.transpose(1, 2) @ height_rel.t()).transpose(1, 2).unsqueeze(-1)
    scores = q.flatten(1, 2) * dim**-0.5 @ k.transpose(1, 2) + (by_row + by_column).flatten(3).flatten(1, 2)
    out = (scores.softmax(-1) @ v).view(batch, heads, rows, columns, block_size, block_size, -1)
    return out.transpose(3, 4).reshape(batch, heads, height, width, -1)


def _shifted(logits: Tensor) -> Tensor:
    """Logits (n, rows, S, 2P-1) of relative positions as those of the keys, (n, rows, S, P), by padding and a view."""
    n, rows, size, entries = logits.shape
    flat = F.pad(F.pad(logits, (0, 1)).flatten(2), (0, entries - size))
    return flat.view(n, rows, size + 1, entries)[:, :, :size, entries // 2 :]


def published_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalization: str,
    feature_map: str = "identity",
    scale: Tensor | None = None,
    rotary: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """Linear attention as the codes of InLine, MALA and L²ViT do it, in the dtype of the arguments.

    The copy that joins the heads afterwards is part of it: the operator's result needs none.
    """
    s = query.shape[3] ** -0.5 if scale is None else scale[:, None, None]
    q, k = (
        {"identity": lambda x: x, "relu": F.relu, "elu_plus_one": _elu_plus_one}[feature_map](x) for x in (query, key)
    )
    if normalization == "division":
        divisor = (q @ k.sum(2, keepdim=True).transpose(2, 3)).clamp(min=epsilon)
        return _joined(q @ (k.transpose(2, 3) @ value * s) / divisor)
    share = (s / query.shape[2]) ** 0.5
    z = q @ k.mean(2, keepdim=True).transpose(2, 3) * s
    if rotary is not None:
        cos, sin = (x.repeat_interleave(2, -1) for x in rotary)
        q, k = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))
    product, mean = q @ ((k * share).transpose(2, 3) @ (value * share)), value.mean(2, keepdim=True)
    if normalization == "subtraction":
        return _joined(product + (1 - z) * mean)
    return _joined(product * (1 + 1 / (z + epsilon)) - z * mean)


def published_flow_attention(query: Tensor, key: Tensor, value: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Flow attention as Flowformer's code does it, in the arguments' dtype, with the copy that joins the heads."""
    q, k, e = query.sigmoid(), key.sigmoid(), epsilon
    taken = 1 / (torch.einsum("bhnd,bhd->bhn", q + e, k.sum(2) + e) + e)
    given = 1 / (torch.einsum("bhnd,bhd->bhn", k + e, q.sum(2) + e) + e)
    sink = torch.einsum("bhnd,bhd->bhn", q + e, (k * given.unsqueeze(3)).sum(2) + e) + e
    source = torch.einsum("bhnd,bhd->bhn", k + e, (q * taken.unsqueeze(3)).sum(2) + e) + e
    weights = source.clamp(-1, 1).softmax(-1).unsqueeze(3) * k.shape[2]
    product = q @ (k.transpose(2, 3) @ (value * weights))
    return _joined(product * taken.unsqueeze(3) * sink.sigmoid().unsqueeze(3))


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "neighborhood_attention": gathered_neighborhood_attention,
    "neighborhood_aggregate": gathered_neighborhood_aggregate,
    "routed_attention": gathered_routed_attention,
    "halo_attention": unfolded_halo_attention,
    "linear_attention": published_linear_attention,
    "flow_attention": published_flow_attention,
}

# fmt: off
SHAPES: dict[str, list[Case]] = {
    "neighborhood_attention": [
        neighborhood(4, 2, 56, 56, 32, kernel_size=7),
        neighborhood(4, 2, 56, 56, 32, kernel_size=7, bias=True),
        neighborhood(4, 4, 28, 28, 32, kernel_size=7),
        neighborhood(4, 4, 28, 28, 32, kernel_size=7, bias=True),
        neighborhood(4, 8, 14, 14, 32, kernel_size=7, bias=True),
        neighborhood(4, 2, 56, 56, 32, kernel_size=7, dilation=8),
        neighborhood(1, 2, 128, 160, 32, kernel_size=7, bias=True),
    ],
    "neighborhood_aggregate": [
        aggregate(4, 8, 14, 14, 16, kernel_size=13),
        aggregate(4, 8, 14, 14, 16, kernel_size=5),
        aggregate(1, 8, 32, 32, 16, kernel_size=13),
        aggregate(1, 8, 64, 64, 16, kernel_size=5),
    ],
    "routed_attention": [
        routed(4, 2, 49, 64, 32, topk=1),
        routed(4, 4, 49, 16, 32, topk=4),
        routed(4, 8, 49, 4, 32, topk=16),
        routed(1, 2, 64, 256, 32, topk=4),
    ],
    "halo_attention": [
        halo(2, 8, 56, 56, 16, block_size=8, halo_size=3),
        halo(2, 8, 32, 32, 32, block_size=8, halo_size=2),
        halo(1, 4, 128, 128, 16, block_size=8, halo_size=3),
    ],
    "linear_attention": [
        linear(4, 3, 3136, 32, normalization="subtraction"),
        linear(4, 6, 784, 32, normalization="subtraction"),
        linear(4, 3, 3136, 32, normalization="division", feature_map="relu", scale=True, epsilon=100.0),
        linear(4, 6, 784, 32, normalization="division", feature_map="relu", scale=True, epsilon=100.0),
        linear(4, 1, 3136, 64, normalization="magnitude", feature_map="elu_plus_one", rotary=True),
        linear(4, 2, 784, 64, normalization="magnitude", feature_map="elu_plus_one", rotary=True),
    ],
    # Sources lie around one, where they are clamped. Of 150,000, two are so close that rounding decides their gradient.
    "flow_attention": [
        flow(1, 12, 3136, 8),
        flow(4, 12, 784, 16),
        flow(4, 12, 196, 32),
    ],
}
# fmt: on
