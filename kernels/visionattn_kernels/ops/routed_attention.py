"""Routed attention: the queries of a region attend to the keys of a few regions, chosen by content.

    out[r, i] = sum_(s, j) softmax_(s, j)(scale * q[r, i] . k[s, j]) v[s, j],    s in routes[r], j in region s

`region_routes` chooses: the regions whose mean keys fit the region's mean query best. The choice is discrete, so that
no gradient passes it; keys and values get theirs from the regions that route to them. Paper: BiFormer
(arXiv:2303.08810).

Shapes: B batch, R regions, T tokens a region, D channels a head, K routes a region.
    query, key, value, out: (B, heads, R, T, D)      routes: (B, R, K) int64      lse: (B, heads, R, T)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn_kernels.cpu import routed_attention as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_kind, check_rank, check_shape


def reference(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float | None = None) -> Tensor:
    """The definition: keys and values of the routed regions, gathered. Arguments as of `routed_attention`."""
    image = torch.arange(len(routes), device=routes.device)[:, None, None]
    # (B, R, K, heads, T, D) as (B, heads, R, K T, D)
    k, v = (x.transpose(1, 2)[image, routes].permute(0, 3, 1, 2, 4, 5).flatten(3, 4) for x in (key, value))
    scores = query @ k.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ v


def decomposition(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float | None = None) -> Tensor:
    """The operator in plain aten, for exported programs: K copies of keys and values. Arguments as of the operator."""
    batch, heads, regions, tokens, dim = query.shape
    image = torch.arange(batch, device=routes.device)[:, None, None]
    rows = (routes + image * regions).flatten()
    q = query.permute(0, 2, 1, 3, 4).reshape(batch * regions, heads, tokens, dim)
    k, v = (
        x.permute(0, 2, 3, 1, 4)
        .reshape(batch * regions, tokens, heads * dim)
        .index_select(0, rows)
        .view(batch * regions, routes.shape[2] * tokens, heads, dim)
        .transpose(1, 2)
        for x in (key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.view(batch, regions, heads, tokens, dim).transpose(1, 2)


def routed_attention(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, scale: float | None = None) -> Tensor:
    """Attend from the tokens of every region to all tokens of the regions that its routes name.

    Args:
        query: (B, heads, R, T, D): the map cut into R regions of T tokens, any strides.
        key: As `query`.
        value: As `query`.
        routes: (B, R, K) int64 between 0 and R - 1, the same for all heads. A region that is named twice counts twice.
            On the CPU the numbers are checked.
        scale: Factor of the scores, by default D ** -0.5. (BiFormer's is that of all heads, (heads D) ** -0.5.)

    Returns:
        (B, heads, R, T, D), a view of (B, R, T, heads, D) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    _check(query, key, value)
    if routes.dtype != torch.int64 or routes.device != query.device:
        raise ValueError(f"routes must be torch.int64 on {query.device}, got {routes.dtype} on {routes.device}")
    check_rank("routes", routes, "(B, R, K)")
    if routes.shape[2] < 1:
        raise ValueError(f"routes must name at least one region, got {tuple(routes.shape)}")
    check_shape("routes", routes, "(B, R, K)", (query.shape[0], query.shape[2], routes.shape[2]))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if wants_plain_aten():
        with no_autocast(query.device.type):
            return decomposition(query, key, value, routes, scale)
    return _forward(query, key, value, routes, scale)[0]


def region_routes(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """Choose for every region the regions to attend to, by the products of the regions' means over tokens.

    Args:
        query: (B, heads, R, T, D) any strides.
        key: As `query`.
        topk: Regions to choose, between 1 and R.

    Returns:
        (B, R, topk) int64, best first; the region itself is not among them unless it is chosen. Means and products are
        those of all heads together, in at least float32.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    _check(query, key, key)
    if not 1 <= topk <= query.shape[2]:
        raise ValueError(f"topk must be between 1 and the number of regions {query.shape[2]}, got {topk}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query.device.type):
        q, k = (x.detach().mean(3, dtype=dtype).transpose(1, 2).flatten(2) for x in (query, key))
        return (q @ k.transpose(1, 2)).topk(topk).indices


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError where the regions do not fit together."""
    check_rank("query", query, "(B, heads, R, T, D)")
    for name, tensor in (("key", key), ("value", value)):
        check_shape(name, tensor, "query's shape", query.shape)
    check_kind(query=query, key=key, value=value)


def _forward_fake(query, key, value, routes, scale):
    """Shapes, strides and dtypes of the forward's results."""
    return empty_map(query), query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))


def _backward_fake(grad, query, key, value, routes, out, lse, scale):
    """Shapes, strides and dtypes of the backward's results."""
    return tuple(empty_map(query) for _ in range(3))


_forward = define(
    "routed_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor routes, float scale) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("routed_attention", "forward"),
)
_backward = define(
    "routed_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor routes, Tensor out, Tensor lse, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("routed_attention", "backward"),
)
register_gradient(_forward, _backward, decomposition, keeps_result=True)
register(Operator("routed_attention", routed_attention, reference, decomposition))
