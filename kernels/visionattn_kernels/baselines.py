"""What each operator is measured against: the formulation that its papers' code or a newcomer would write, and shapes.

Baselines take the arguments of the operator, support autograd, and are compared with the reference by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from visionattn_kernels.ops.windows import window_offsets
from visionattn_kernels.testing import Case, neighborhood, routed


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


def gathered_routed_attention(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float | None = None
) -> Tensor:
    """Routed attention as BiFormer's code does it: `gather` on keys and values that are expanded to every region."""
    batch, heads, regions, tokens, dim = query.shape
    count = routes.shape[2]
    pairs = torch.cat([x.permute(0, 2, 3, 1, 4).flatten(3) for x in (key, value)], -1)
    everywhere = pairs.unsqueeze(1).expand(-1, regions, -1, -1, -1)
    index = routes.view(batch, regions, count, 1, 1).expand(-1, -1, -1, tokens, pairs.shape[-1])
    k, v = everywhere.gather(2, index).view(batch * regions, count * tokens, 2, heads, dim).unbind(2)
    q = query.permute(0, 2, 1, 3, 4).reshape(batch * regions, heads, tokens, dim)
    scores = (q * (dim**-0.5 if scale is None else scale)) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).view(batch, regions, heads, tokens, dim).transpose(1, 2)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "neighborhood_attention": gathered_neighborhood_attention,
    "routed_attention": gathered_routed_attention,
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
    "routed_attention": [
        routed(4, 2, 49, 64, 32, topk=1),
        routed(4, 4, 49, 16, 32, topk=4),
        routed(4, 8, 49, 4, 32, topk=16),
        routed(1, 2, 64, 256, 32, topk=4),
    ],
}
# fmt: on
