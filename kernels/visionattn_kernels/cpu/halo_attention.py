"""Halo attention on the CPU: blocks of a row of blocks at a time, with copies of their windows.

The relative logits of a block are a product of its queries with a table of rows and one of columns; their sums over
pairs of them are the mask of fused attention forward, and are added to the scores in place backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.ops.windows import relative_entries

# Scores computed at once by a thread, 2 MiB in float32, of which the backward holds three arrays: twice as many are up
# to 30 % slower (56x56, blocks of 8, halo of 3), a quarter of them 10 %.
SCORES_AT_ONCE = 2**19


def forward(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale):
    """Fused attention on the blocks; the narrower of keys and values is filled up with zeros, as it demands."""
    queries, window = block_size // stride, block_size + 2 * halo_size
    out = empty_map(query, dim=value.shape[-1])
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    tables = _tables(height_rel, width_rel, queries, window, query.dtype)
    width = max(query.shape[-1], value.shape[-1])
    for images, row, columns in _chunks(query.shape, queries, window):
        at_queries, at_keys = _places(row, columns, queries, 0), _places(row, columns, block_size, halo_size)
        q = _cut(query[images], *at_queries, queries, query.dtype, width)
        k, v = (_cut(x[images], *at_keys, window, query.dtype, width) for x in (key, value))
        by_row, by_column = _relative_logits(q[..., : query.shape[-1]], tables)
        mask = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(-2)
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.flatten(0, 1).flatten(2, 3) for x in (q, k, v)), attn_mask=mask.flatten(0, 1).flatten(2, 3), scale=scale
        )
        _put(out[images], result.view(q.shape)[..., : value.shape[-1]], *at_queries)
        _put(lse[images].unsqueeze(-1), sums.reshape(*q.shape[:-1], 1), *at_queries)
    return out, lse


def backward(grad, query, key, value, height_rel, width_rel, out, lse, block_size, halo_size, stride, scale):
    """Closed form on the blocks of the forward, whose scores are computed again; sums in at least float32."""
    queries, window = block_size // stride, block_size + 2 * halo_size
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_query, grad_key, grad_value = (empty_map(x, dtype).zero_() for x in (query, key, value))
    tables = _tables(height_rel, width_rel, queries, window, dtype)
    grad_tables = tuple(torch.zeros_like(table) for table in tables)
    for images, row, columns in _chunks(query.shape, queries, window):
        at_queries, at_keys = _places(row, columns, queries, 0), _places(row, columns, block_size, halo_size)
        q, g = (_cut(x[images], *at_queries, queries, dtype) for x in (query, grad))
        k, v = (_cut(x[images], *at_keys, window, dtype) for x in (key, value))
        parts = _attend_backward(q, g, k, v, tables, grad_tables, scale)
        _put(grad_query[images], parts[0], *at_queries)
        _put(grad_key[images], parts[1], *at_keys, add=True)
        _put(grad_value[images], parts[2], *at_keys, add=True)
    entries = relative_entries(queries, window).flatten()
    rels = (x.new_zeros(x.shape, dtype=dtype) for x in (height_rel, width_rel))
    rels = (x.index_add_(0, entries, table.flatten(0, 1)) for x, table in zip(rels, grad_tables, strict=True))
    return tuple(x.to(query.dtype) for x in (grad_query, grad_key, grad_value, *rels))


def _attend_backward(q, g, k, v, tables, grad_tables, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the blocks q and of the windows k and v; those of the tables are added to `grad_tables`."""
    scaled, g_flat, k_flat, v_flat = (x.flatten(0, 2).flatten(1, 2) for x in (q * scale, g, k, v))
    by_row, by_column = _relative_logits(q, tables)
    scores = (scaled @ k_flat.transpose(1, 2)).view(*by_row.shape, by_column.shape[-1])
    scores += by_row.unsqueeze(-1)
    scores += by_column.unsqueeze(-2)
    weights = torch.softmax(scores.view(*scaled.shape[:2], -1), -1)
    grad_scores = torch._softmax_backward_data(g_flat @ v_flat.transpose(1, 2), weights, -1, weights.dtype)
    pairs = grad_scores.view(scores.shape)
    grad_by_row, grad_by_column = pairs.sum(-1), pairs.sum(-2)
    grad_q = (grad_scores @ k_flat).mul_(scale).view(q.shape)
    grad_q += torch.einsum("bnhijr,ird->bnhijd", grad_by_row, tables[0])
    grad_q += torch.einsum("bnhijs,jsd->bnhijd", grad_by_column, tables[1])
    grad_tables[0].add_(torch.einsum("bnhijr,bnhijd->ird", grad_by_row, q))
    grad_tables[1].add_(torch.einsum("bnhijs,bnhijd->jsd", grad_by_column, q))
    grad_k = (grad_scores.transpose(1, 2) @ scaled).view(k.shape)
    return grad_q, grad_k, (weights.transpose(1, 2) @ g_flat).view(v.shape)


def _tables(height_rel: Tensor, width_rel: Tensor, queries: int, window: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tables' entries for each row or column of queries and of keys, (queries, window, D)."""
    entries = relative_entries(queries, window)
    return tuple(table[entries].to(dtype) for table in (height_rel, width_rel))


def _relative_logits(q: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of each query (..., i, j, D): (..., i, j, window rows) and (..., i, j, window columns)."""
    by_row = torch.einsum("bnhijd,ird->bnhijr", q, tables[0])
    return by_row, torch.einsum("bnhijd,jsd->bnhijs", q, tables[1])


def _chunks(shape: torch.Size, queries: int, window: int) -> Iterator[tuple[slice, int, range]]:
    """Split the blocks to `SCORES_AT_ONCE` a thread: images, row of blocks, columns of blocks."""
    batch, heads, rows, columns = shape[0], shape[1], -(-shape[2] // queries), -(-shape[3] // queries)
    at_once = max(1, SCORES_AT_ONCE * torch.get_num_threads() // (heads * (queries * window) ** 2))
    step, images = min(at_once, columns), max(1, at_once // columns)
    for image, row, first in product(range(0, batch, images), range(rows), range(0, columns, step)):
        yield slice(image, image + images), row, range(first, min(first + step, columns))


def _places(row: int, columns: range, size: int, halo: int) -> tuple[int, list[int]]:
    """First row, and first column of each, of the squares of a row of blocks."""
    return row * size - halo, [column * size - halo for column in columns]


def _overlaps(
    shape: torch.Size, top: int, lefts: list[int], size: int
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """For each square: its number, its rows and columns of the map, and the same as its own rows and columns."""
    rows = slice(max(top, 0), min(top + size, shape[2]))
    for number, left in enumerate(lefts):
        columns = slice(max(left, 0), min(left + size, shape[3]))
        own = (slice(x.start - first, x.stop - first) for x, first in ((rows, top), (columns, left)))
        yield number, (rows, columns), tuple(own)


def _cut(x: Tensor, top: int, lefts: list[int], size: int, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """Copy squares of a map (B, heads, H, W, D), as (B, squares, heads, size, size, width), zero outside the map."""
    batch, heads, *_, dim = x.shape
    squares = x.new_zeros((batch, len(lefts), heads, size, size, width or dim), dtype=dtype)
    for number, here, there in _overlaps(x.shape, top, lefts, size):
        squares[:, number, :, *there, :dim] = x[:, :, *here]
    return squares


def _put(x: Tensor, squares: Tensor, top: int, lefts: list[int], add: bool = False) -> None:
    """Write squares back into the map `x`, or add them to it; what is outside the map is dropped."""
    for number, here, there in _overlaps(x.shape, top, lefts, squares.shape[3]):
        part = squares[:, number, :, *there]
        if add:
            x[:, :, *here] += part
        else:
            x[:, :, *here] = part
