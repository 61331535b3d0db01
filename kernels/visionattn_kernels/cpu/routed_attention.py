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

# Elements of keys, and of values, that the forward copies in one go, 8 MiB each in float32: all of a small map's, whose
# result needs no joining then. In two calls 4x4x49x16x32 with 4 routes took 25 % longer.
FORWARD_WHOLE = 2**21
# Of larger ones it copies so many at a time: 16x4x49x16x32 took 9 % longer with four times as many. The backward has
# gradients of as much beside them, and took 10 % longer with more than half (4 images of these, one thread).
FORWARD_AT_ONCE = 2**19
BACKWARD_AT_ONCE = 2**18

# Copying a key takes as long as attending to it from so many queries: both paths break even between 10 and 20 for
# regions of 4 to 64 tokens.
COPY_IN_QUERIES = 16

# The mask of the dense path takes the square of the tokens, 4 MiB in float32.
DENSE_TOKENS = 1024


def forward(query, key, value, routes, scale):
    """Under a mask, or from copied regions."""
    _check_range(routes, query.shape[2])
    parts = (_dense_forward if _is_dense(query, routes) else _copied_forward)(query, key, value, routes, scale)
    out, lse = _joined(parts, query)
    return out, lse.contiguous()


def backward(grad, query, key, value, routes, out, lse, scale):
    """The same in closed form; gradients of keys add up in at least float32, in the order of the regions."""
    if _is_dense(query, routes):
        gradients = _joined(_dense_backward(grad, query, key, value, routes, out, lse, scale), query)
    else:
        gradients = _copied_backward(grad, query, key, value, routes, out, lse, scale)
    return tuple(x.to(query.dtype) for x in gradients)


def _copied_forward(query, key, value, routes, scale):
    """Result and logarithms of sums for some regions at a time, (n, T, heads, D) and (n, T, heads)."""
    q, k, v = (_regions(x) for x in (query, key, value))
    for some, rows in _chunks(routes, q, FORWARD_AT_ONCE, FORWARD_WHOLE):
        keys, values = (_copy(x, rows, q.dtype) for x in (k, v))
        yield tuple(x.transpose(1, 2) for x in _attend(_some(q, some, q.dtype), keys, values, scale=scale))


def _copied_backward(grad, query, key, value, routes, out, lse, scale):
    """Gradients of query, key and value."""
    dtype = lse.dtype
    gradients = tuple(empty_map(query, dtype).zero_() for _ in range(3))
    g, q, k, v, o, total, grad_q, *grads = (_regions(x) for x in (grad, query, key, value, out, lse, *gradients))
    for some, rows in _chunks(routes, q, BACKWARD_AT_ONCE):
        grad_out, queries, result = (_some(x, some, dtype) for x in (g, q, o))
        keys, values = (_copy(x, rows, dtype) for x in (k, v))
        parts = _attend_backward(grad_out, queries, keys, values, result, total[some], 0.0, False, scale=scale)
        grad_q[some] = parts[0]
        for into, part in zip(grads, parts[1:], strict=True):
            of_regions = part.transpose(1, 2).unflatten(1, (rows.shape[1], -1)).flatten(0, 1)
            into.transpose(1, 2).index_add_(0, rows.flatten(), of_regions)
    return gradients


def _dense_forward(query, key, value, routes, scale):
    """Result and logarithms of sums for some images at a time, (n, R T, heads, D) and (n, R T, heads)."""
    for some in _images(query):
        tensors = [_tokens(x[some], query.dtype) for x in (query, key, value)]
        attended = _attend(*tensors, attn_mask=_mask(routes[some], query, query.dtype), scale=scale)
        yield tuple(x.transpose(1, 2) for x in attended)


def _dense_backward(grad, query, key, value, routes, out, lse, scale):
    """Gradients of query, key and value for some images at a time, (n, R T, heads, D)."""
    for some in _images(query):
        tensors = (_tokens(x[some], lse.dtype) for x in (grad, query, key, value, out))
        mask, total = _mask(routes[some], query, lse.dtype), lse[some].flatten(2)
        results = _attend_backward(*tensors, total, 0.0, False, attn_mask=mask, scale=scale)
        yield tuple(x.transpose(1, 2) for x in results)


def _joined(parts: Iterator[tuple[Tensor, ...]], query: Tensor) -> list[Tensor]:
    """Results of some tokens at a time, (n, tokens, heads, ...) in their order, as those of all (B, heads, R, T, ...).

    Each part is put in its place before the next is computed. One that is all of the result stays where it is.
    """
    batch, heads, regions, tokens = query.shape[:4]
    joined, first = [], 0
    for part in parts:
        rows = [x.contiguous().flatten(0, 1) for x in part]
        last = first + len(rows[0])
        if last - first == batch * regions * tokens:
            joined = rows
        else:
            joined = joined or [x.new_empty(batch * regions * tokens, *x.shape[1:]) for x in rows]
            for whole, x in zip(joined, rows, strict=True):
                whole[first:last] = x
        first = last
    return [x.view(batch, regions, tokens, heads, *x.shape[2:]).movedim(3, 1) for x in joined]


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


def _images(query: Tensor) -> Iterator[slice]:
    """Split the images so that the masks of each part have at most the square of `DENSE_TOKENS` elements."""
    batch, _, regions, tokens = query.shape[:4]
    step = max(1, (DENSE_TOKENS // max(1, regions * tokens)) ** 2)
    for first in range(0, max(1, batch), step):
        yield slice(first, first + step)


def _mask(routed: Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1, R T, R T): the logarithm of how often the query's region names the key's, -inf for never."""
    images, regions, _ = routed.shape
    named = query.new_zeros(images, regions, regions, dtype=dtype)
    named.scatter_add_(2, routed, named.new_ones(1).expand(routed.shape))
    tokens = query.shape[3]
    return named.log_().repeat_interleave(tokens, 1).repeat_interleave(tokens, 2).unsqueeze(1)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, heads, R, T, D) as (n, heads, R T, D)."""
    return _aligned(x.flatten(2, 3).to(dtype))


def _regions(x: Tensor) -> Tensor:
    """(B, heads, R, ...) as (B R, heads, ...), without a copy where heads are inside of regions, as in the models."""
    return x.movedim(1, 3).flatten(0, 1).movedim(2, 1)


def _chunks(routes: Tensor, regions: Tensor, at_once: int, whole: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Split the regions of all images so that `at_once` elements are copied: some regions, and the rows they name.

    Up to `whole` elements are not split.
    """
    batch, per_image, count = routes.shape
    rows = (routes + torch.arange(0, batch * per_image, per_image)[:, None, None]).flatten(0, 1)
    elements = max(1, count * regions[:1].numel())
    step = max(1, (whole if len(rows) * elements <= whole else at_once) // elements)
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
