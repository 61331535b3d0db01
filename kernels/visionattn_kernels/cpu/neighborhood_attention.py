"""Neighborhood attention on the CPU: query tiles, one additive mask and batched matrix products.

A tile of queries is multiplied with all keys that any of its windows holds, and the mask takes out the rest, the bias
being part of it. The classes of a dilation are further batches. Queries, keys and values are copied once, into strips
as wide as a tile and as high as the map: the rows of a strip that a tile needs are a matrix already, so that tiles one
below the other share their copies. The scores of a row of tiles stay in the cache; nothing grows faster than the area
of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn_kernels.cpu.tiles import (
    ROWS,
    ROWS_ALONE,
    TilePlan,
    add_tiles,
    chunks,
    drop_covered,
    gather,
    matrices,
    put_tiles,
    residue_maps,
    tile_plan,
)
from visionattn_kernels.layout import empty_map


def forward(query, key, value, bias, kernel_size, stride, dilation, scale):
    """Batched SDPA on query tiles with an additive mask, rows of tiles that share it in one call."""
    out = empty_map(query)
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    maps = (residue_maps(x, dilation) for x in (query, key, value, out, lse.unsqueeze(-1)))
    for q, k, v, o, total in zip(*maps, strict=True):
        plan = tile_plan(tuple(q.shape[4:6]), tuple(kernel_size), tuple(stride), query.dtype, ROWS)
        mask = plan.mask if bias is None else plan.bias_mask(bias)
        for chunk in chunks(plan.mask[0].numel(), q.shape[:3], q.shape[3]):
            _attend(q[chunk], k[chunk], v[chunk], o[chunk], total[chunk], plan, mask, scale)
    return out, lse


def _attend(q, k, v, out, lse, plan: TilePlan, mask, scale) -> None:
    """Write attention of one chunk into `out` and the logarithms of the softmax's sums into `lse`."""
    columns, heads, step = plan.columns, q.shape[3], plan.rows.queries
    queries = gather(q, columns.query_start, columns.queries, q.dtype)
    keys, values = (gather(x, columns.key_start, columns.keys, x.dtype) for x in (k, v))
    for group in plan.groups:
        row_mask = mask[group.pattern].expand(-1, heads, -1, -1).flatten(0, 1).unsqueeze(0)
        if group.tiles > 1:  # the batch of SDPA is then all that has a mask of its own
            row_mask = row_mask.expand(q.shape[:3].numel(), -1, -1, -1).flatten(0, 1).unsqueeze(1)
        result, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(
                _batches(x, rows, group.tiles, step)
                for x, rows in ((queries, group.queries), (keys, group.keys), (values, group.keys))
            ),
            attn_mask=row_mask,
            scale=scale,
        )
        shape = (*queries.shape[:5], group.tiles, step, columns.queries, -1)
        for x, tiles in ((out, result), (lse, total.unsqueeze(-1))):
            rows = x[..., group.queries, :, :].unflatten(-3, (group.tiles, step))
            put_tiles(rows, tiles.view(shape), columns.fresh)


def _batches(strips: Tensor, rows: slice, tiles: int, step: int) -> Tensor:
    """View the tiles that lie `step` apart in `rows` of strips as SDPA's (batch, heads, positions, D).

    Of one row of tiles, heads are all tiles and heads of an image, which share no mask but with other images. Of
    several, they are the rows of tiles, which share it.
    """
    x = strips[..., rows, :, :]
    if tiles == 1:
        return matrices(x)
    size = x.shape[5] - (tiles - 1) * step
    return x.unfold(5, size, step).movedim(-1, 6).flatten(6, 7).flatten(0, 4)


def backward(grad, query, key, value, bias, out, lse, kernel_size, stride, dilation, scale):
    """Closed form on the tiles of the forward, whose scores are computed again; sums in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Every query is written once, while keys and values collect from several tiles.
    grad_query, grad_key, grad_value = empty_map(query, dtype), *(empty_map(query, dtype).zero_() for _ in range(2))
    grad_bias = query.new_zeros(0 if bias is None else (*bias.shape,), dtype=dtype)
    maps = (residue_maps(x, dilation) for x in (query, key, value, grad, grad_query, grad_key, grad_value))
    for parts in zip(*maps, strict=True):
        plan = tile_plan(tuple(parts[0].shape[4:6]), tuple(kernel_size), tuple(stride), dtype, ROWS_ALONE)
        mask = plan.mask if bias is None else plan.bias_mask(bias.to(dtype))
        grad_mask = None if bias is None else torch.zeros_like(mask)
        for chunk in chunks(plan.mask[0].numel(), parts[0].shape[:3], query.shape[1]):
            _attend_backward(*(x[chunk] for x in parts), plan, mask, grad_mask, scale)
        if bias is not None:
            _add_bias_gradient(grad_bias, grad_mask, plan)
    return tuple(x.to(query.dtype) for x in (grad_query, grad_key, grad_value, grad_bias))


def _attend_backward(q, k, v, grad, grad_q, grad_k, grad_v, plan: TilePlan, mask, grad_mask, scale) -> None:
    """Write one chunk's `grad_q` and add to `grad_k`, `grad_v` and, unless it is None, `grad_mask`."""
    rows, columns, dtype = plan.rows, plan.columns, grad_q.dtype
    queries, grads = (gather(x, columns.query_start, columns.queries, dtype) for x in (q, grad))
    keys, values = (gather(x, columns.key_start, columns.keys, dtype) for x in (k, v))
    queries *= scale
    # Without its gradient, a query that an earlier tile holds adds nothing.
    drop_covered(grads, columns.fresh)
    grad_queries, grad_keys, grad_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for row, (pattern, top, first) in enumerate(zip(plan.pattern, rows.query_start, rows.key_start, strict=True)):
        fresh, key_rows = top + rows.fresh[row], slice(first, first + rows.keys)
        grads[..., top:fresh, :, :] = 0
        tile_q, tile_grad = (matrices(x[..., top : top + rows.queries, :, :]) for x in (queries, grads))
        tile_k, tile_v, sum_k, sum_v = (
            matrices(x[..., key_rows, :, :]) for x in (keys, values, grad_keys, grad_values)
        )
        row_mask = mask[pattern].expand(-1, q.shape[3], -1, -1).flatten(0, 1)
        weights = torch.softmax((tile_q @ tile_k.transpose(-2, -1)).add_(row_mask), -1)
        grad_weights = tile_grad @ tile_v.transpose(-2, -1)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
        if grad_mask is not None:
            grad_mask[pattern] += grad_scores.sum(0).view(grad_mask.shape[1:])
        result = (grad_scores @ tile_k).mul_(scale).view_as(grad_queries[..., top : top + rows.queries, :, :])
        grad_queries[..., fresh : top + rows.queries, :, :] = result[..., fresh - top :, :, :]
        sum_k += grad_scores.transpose(-2, -1) @ tile_q
        sum_v += weights.transpose(-2, -1) @ tile_grad
    put_tiles(grad_q, grad_queries, columns.fresh)
    add_tiles(grad_k, grad_keys, columns.key_start)
    add_tiles(grad_v, grad_values, columns.key_start)


def _add_bias_gradient(grad_bias: Tensor, grad_mask: Tensor, plan: TilePlan) -> None:
    """Add the gradient of the masks (patterns, columns, heads, queries, keys) to that of their bias."""
    heads = len(grad_bias)
    per_head = grad_mask.permute(2, 0, 1, 3, 4).reshape(heads, -1)
    entries = grad_bias.new_zeros(heads, grad_bias[0].numel() + 1)
    entries.scatter_add_(1, plan.index.flatten().long().expand(heads, -1), per_head)
    grad_bias += entries[:, :-1].view(grad_bias.shape)
