"""Routed attention on the CPU: fused attention over copies of the routed regions, a few regions at a time.

The regions of all images are one row of them, so that small maps take one call, and only some regions' copies exist at
a time. Where regions are tiny, or most are routed to, attending to all keys under a mask costs less than copying.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn_kernels.layout import empty_map

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Elements of keys, and of values, copied at once in the forward: 4 MiB each in float32, all of a small map's. A quarter
# took 16 % longer (4x2x49x64x32, 1 route, one thread). The backward has gradients of as much beside them, and took 10 %
# longer with more than a quarter (4x4x49x16x32, 4 routes).
FORWARD_AT_ONCE = 2**20
BACKWARD_AT_ONCE = 2**18

# Copying a key takes as long as attending to it from so many queries: both paths break even between 10 and 20 for
# regions of 4 to 64 tokens.
COPY_IN_QUERIES = 16

# The mask of the dense path takes the square of the tokens, 4 MiB in float32.
DENSE_TOKENS = 1024


def forward(query, key, value, routes, scale):
    """Under a mask image by image, or from copied regions."""
    _check_range(routes, query.shape[2])
    if _is_dense(query, routes):
        return _dense_forward(query, key, value, routes, scale)
    q, k, v = (_regions(x) for x in (query, key, value))
    parts = []
    for some, rows in _chunks(routes, q, FORWARD_AT_ONCE):
        keys, values = (_copy(x, rows, q.dtype) for x in (k, v))
        result, sums = _attend(_some(q, some, q.dtype), keys, values, scale=scale)
        parts.append((result.transpose(1, 2), sums))
    out, lse = (torch.cat(x) if len(x) > 1 else x[0].contiguous() for x in zip(*parts, strict=True))
    return _maps(out.transpose(1, 2), query), _maps(lse, query).contiguous()


def backward(grad, query, key, value, routes, out, lse, scale):
    """The same in closed form; gradients of keys add up in at least float32, in the order of the regions."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    gradients = tuple(empty_map(query, dtype).zero_() for _ in range(3))
    if _is_dense(query, routes):
        _dense_backward(grad, query, key, value, routes, out, lse, scale, gradients)
    else:
        g, q, k, v, o, total, grad_q, *grads = (_regions(x) for x in (grad, query, key, value, out, lse, *gradients))
        for some, rows in _chunks(routes, q, BACKWARD_AT_ONCE):
            grad_out, queries, result = (_some(x, some, dtype) for x in (g, q, o))
            keys, values = (_copy(x, rows, dtype) for x in (k, v))
            parts = _attend_backward(grad_out, queries, keys, values, result, total[some], 0.0, False, scale=scale)
            grad_q[some] = parts[0]
            for into, part in zip(grads, parts[1:], strict=True):
                of_regions = part.transpose(1, 2).unflatten(1, (rows.shape[1], -1)).flatten(0, 1)
                into.transpose(1, 2).index_add_(0, rows.flatten(), of_regions)
    return tuple(x.to(query.dtype) for x in gradients)


def _dense_forward(query, key, value, routes, scale):
    """All tokens of an image attend to all, under the mask of its routes."""
    out = empty_map(query)
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    for q, k, v, o, total, routed in zip(query, key, value, out, lse, routes, strict=True):
        result, sums = _attend(*(_tokens(x, q.dtype) for x in (q, k, v)), attn_mask=_mask(routed, q), scale=scale)
        o.copy_(result.view(o.shape))
        total.copy_(sums.view(total.shape))
    return out, lse


def _dense_backward(grad, query, key, value, routes, out, lse, scale, gradients):
    """Write the gradients of query, key and value into `gradients`."""
    for g, q, k, v, routed, o, total, *grads in zip(grad, query, key, value, routes, out, lse, *gradients, strict=True):
        tensors = (_tokens(x, total.dtype) for x in (g, q, k, v, o))
        mask = _mask(routed, total)
        results = _attend_backward(*tensors, total.flatten(1)[None], 0.0, False, attn_mask=mask, scale=scale)
        for into, result in zip(grads, results, strict=True):
            into.copy_(result.view(into.shape))


def _check_range(routes: Tensor, regions: int) -> None:
    """Raise ValueError where a route names no region."""
    if routes.numel():
        low, high = (bound.item() for bound in routes.aminmax())
        if low < 0 or high >= regions:
            raise ValueError(f"routes must be between 0 and {regions - 1}, got {low} to {high}")


def _is_dense(query: Tensor, routes: Tensor) -> bool:
    """Whether all keys under a mask take less time than copies of the routed ones."""
    regions, tokens = query.shape[2:4]
    return regions * tokens <= min(routes.shape[2] * (tokens + COPY_IN_QUERIES), DENSE_TOKENS)


def _mask(routed: Tensor, like: Tensor) -> Tensor:
    """(R T, R T) of `like`'s dtype: the logarithm of how often the query's region names the key's, -inf for never."""
    regions, tokens = like.shape[1:3]
    named = like.new_zeros(regions, regions).scatter_add_(1, routed, like.new_ones(1).expand(routed.shape))
    return named.log_().repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(heads, R, T, D) as (1, heads, R T, D)."""
    return _aligned(x.flatten(1, 2).unsqueeze(0).to(dtype))


def _regions(x: Tensor) -> Tensor:
    """(B, heads, R, ...) as (B R, heads, ...), without a copy where heads are inside of regions, as in the models."""
    return x.movedim(1, 3).flatten(0, 1).movedim(2, 1)


def _maps(x: Tensor, like: Tensor) -> Tensor:
    """(B R, heads, ...) as (B, heads, R, ...)."""
    return x.unflatten(0, (len(like), like.shape[2])).transpose(1, 2)


def _chunks(routes: Tensor, regions: Tensor, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """Split the regions of all images so that `at_once` elements are copied: some regions, and the rows they name."""
    batch, per_image, count = routes.shape
    rows = (routes + torch.arange(0, batch * per_image, per_image)[:, None, None]).flatten(0, 1)
    step = max(1, at_once // max(1, count * regions[:1].numel()))
    for first in range(0, max(1, len(rows)), step):
        some = slice(first, first + step)
        yield some, rows[some]


def _some(x: Tensor, some: slice, dtype: torch.dtype) -> Tensor:
    """The regions `some` of (B R, heads, T, D)."""
    return _aligned(x[some].to(dtype))


def _aligned(x: Tensor) -> Tensor:
    """`x` with adjacent channels, which the fused kernel assumes and does not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _copy(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the regions that `rows` (n, K) names from (B R, heads, T, D), as (n, heads, K T, D)."""
    copied = x.transpose(1, 2).index_select(0, rows.flatten()).to(dtype)
    return copied.unflatten(0, rows.shape).flatten(1, 2).transpose(1, 2)
