"""Floating point operations of the operators, which torch's counter cannot know.

    from torch.utils.flop_counter import FlopCounterMode
    from visionattn_kernels.flops import FORMULAS

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(image)
    counter.get_total_flops()

As for torch's own operators, only products of matrices count, a multiplication and an addition for each pair; softmax,
feature maps and normalisations do not. The formulas are those of the forward: what a window, a halo or the routes leave
out is not counted, whatever a backend computes in vain. Backward passes are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

# Imported for the operators' registration.
import visionattn_kernels  # noqa: F401

Shape = Sequence[int]


def _neighborhood_attention(query: Shape, key: Shape, value: Shape, bias: Shape | None, kernel_size: Shape, *_, **__):
    """Scores and sums over the K² keys of every query: (B, heads, H, W, D)."""
    return 2 * prod(query[:4]) * prod(kernel_size) * (query[4] + value[4])


def _neighborhood_aggregate(weights: Shape, value: Shape, kernel_size: Shape, *_, **__):
    """Sums over the K² values of every place: (B, heads, H, W, D)."""
    return 2 * prod(value) * prod(kernel_size)


def _halo_attention(query: Shape, key: Shape, value: Shape, height_rel: Shape, width_rel: Shape, *settings, **_):
    """Scores and sums over the P² keys of every query's window, and its products with P rows of either table."""
    block_size, halo_size = settings[:2]
    window = block_size + 2 * halo_size
    return 2 * prod(query[:4]) * (window**2 * (query[4] + value[4]) + 2 * window * query[4])


def _routed_attention(query: Shape, key: Shape, value: Shape, routes: Shape, *_, **__):
    """Scores and sums over the tokens of the routed regions: (B, heads, R, T, D), routes (B, R, K)."""
    return 2 * prod(query[:4]) * routes[2] * query[3] * (query[4] + value[4])


def _linear_attention(query: Shape, key: Shape, value: Shape, *_, **__):
    """The moments k v^T, the queries' products with them, and those with the mean key: (B, heads, N, D) and E."""
    return 2 * prod(query) * (2 * value[3] + 1)


def _flow_attention(query: Shape, key: Shape, value: Shape, *_, **__):
    """The moments k v^T, the queries' products with them, and four flows: (B, heads, N, D) and E."""
    return 2 * prod(query) * (2 * value[3] + 4)


FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {
    torch.ops.visionattn.neighborhood_attention: _neighborhood_attention,
    torch.ops.visionattn.neighborhood_aggregate: _neighborhood_aggregate,
    torch.ops.visionattn.halo_attention: _halo_attention,
    torch.ops.visionattn.routed_attention: _routed_attention,
    torch.ops.visionattn.linear_attention: _linear_attention,
    torch.ops.visionattn.flow_attention: _flow_attention,
}
