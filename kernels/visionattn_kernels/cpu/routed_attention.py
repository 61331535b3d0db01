"""Routed attention on the CPU: fused attention over copies of the routed regions, a few regions at a time.

The copies stay in the cache, and only a few regions' worth of them exists at a time. Where regions are tiny, or most of
them are routed to, attending to all keys under a mask costs less than copying.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn_kernels.layout import empty_map

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Elements of keys, and of values, copied at once: 1 MiB each in float32. Twice as many were not faster, half as many
# took 5 % and a quarter 17 % longer (forward, 56x56, 1 route).
COPIED_AT_ONCE = 2**18

# Copying a key takes as long as attending to it from so many queries: both paths break even between 10 and 20 for
# regions of 4 to 64 tokens.
COPY_IN_QUERIES = 16

# The mask of the dense path takes the square of the tokens, 4 MiB in float32.
DENSE_TOKENS = 1024


def forward(query, key, value, routes, scale):
    """Image by image, under a mask or from copied regions."""
    _check_range(routes, query.shape[2])
    out = empty_map(query)
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    dense = _is_dense(query, routes)
    for q, k, v, o, total, routed in zip(query, key, value, out, lse, routes, strict=True):
        if dense:
            result, sums = _attend(*(_tokens(x, q.dtype) for x in (q, k, v)), attn_mask=_mask(routed, q), scale=scale)
            o.copy_(result.view(o.shape))
            total.copy_(sums.view(total.shape))
            continue
        for some, rows in _chunks(routed, q):
            keys, values = (_copy(x, rows, q.dtype) for x in (k, v))
            result, sums = _attend(_some(q, some, q.dtype), keys, values, scale=scale)
            o[:, some] = result.transpose(0, 1)
            total[:, some] = sums.transpose(0, 1)
    return out, lse


def backward(grad, query, key, value, routes, out, lse, scale):
    """The same in closed form; gradients of keys add up in at least float32, in the order of the regions."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    gradients = tuple(empty_map(query, dtype).zero_() for _ in range(3))
    dense = _is_dense(query, routes)
    for g, q, k, v, routed, o, total, *grads in zip(grad, query, key, value, routes, out, lse, *gradients, strict=True):
        if dense:
            tensors = (_tokens(x, dtype) for x in (g, q, k, v, o))
            mask = _mask(routed, total)
            results = _attend_backward(*tensors, total.flatten(1)[None], 0.0, False, attn_mask=mask, scale=scale)
            for into, result in zip(grads, results, strict=True):
                into.copy_(result.view(into.shape))
            continue
        for some, rows in _chunks(routed, q):
            grad_out, queries, result = (_some(x, some, dtype) for x in (g, q, o))
            keys, values = (_copy(x, rows, dtype) for x in (k, v))
            sums = total[:, some].transpose(0, 1)
            parts = _attend_backward(grad_out, queries, keys, values, result, sums, 0.0, False, scale=scale)
            grads[0][:, some] = parts[0].transpose(0, 1)
            for into, part in zip(grads[1:], parts[1:], strict=True):
                regions = into.permute(1, 2, 0, 3)
                part = part.transpose(1, 2).reshape(rows.numel(), *regions.shape[1:])
                regions.index_add_(0, rows.flatten(), part)
    return tuple(x.to(query.dtype) for x in gradients)


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


def _chunks(routed: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Split the regions of an image so that `COPIED_AT_ONCE` holds: the regions, and their routes."""
    heads, regions, tokens, dim = query.shape
    step = max(1, COPIED_AT_ONCE // max(1, routed.shape[1] * heads * tokens * dim))
    for first in range(0, regions, step):
        some = slice(first, first + step)
        yield some, routed[some]


def _some(x: Tensor, some: slice, dtype: torch.dtype) -> Tensor:
    """The regions `some` of (heads, R, T, D), as (regions, heads, T, D)."""
    return _aligned(x[:, some].transpose(0, 1).to(dtype))


def _aligned(x: Tensor) -> Tensor:
    """`x` with adjacent channels, which the fused kernel assumes and does not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _copy(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the regions that `rows` (regions, K) names from (heads, R, T, D), as (regions, heads, K T, D)."""
    if x.stride(0) > x.stride(1):  # in the order of the memory, which takes half as long
        copied = x.index_select(1, rows.flatten()).to(dtype)
        return copied.view(len(x), len(rows), -1, x.shape[-1]).transpose(0, 1)
    copied = x.permute(1, 2, 0, 3).index_select(0, rows.flatten()).to(dtype)
    return copied.view(len(rows), -1, *copied.shape[2:]).transpose(1, 2)
