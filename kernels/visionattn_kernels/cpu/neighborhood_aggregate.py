"""Neighborhood aggregate on the CPU: the weights of a tile of queries, spread over the tile's keys, times their values.

Within a tile the windows of consecutive queries start one key apart, or together at the border. Seen with the right
strides, the spread weights of such a run are a box again, so that spreading is one copy a run and collecting another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn_kernels.cpu.tiles import (
    AxisTiles,
    Run,
    add_tiles,
    axis_tiles,
    chunks,
    drop_covered,
    gather,
    matrices,
    residue_maps,
    tile_runs,
)
from visionattn_kernels.layout import empty_map


class Cover(NamedTuple):
    """How query tiles cover a map of one residue class per axis, and the runs of each tile's rows and columns."""

    kernel: Sequence[int]
    rows: AxisTiles
    columns: AxisTiles
    row_runs: list[list[Run]]
    column_runs: list[list[Run]]

    def bands(self, spread: Tensor, row: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Where a row of tiles, (B, r, s, tiles, heads, rows, columns, key rows, key columns), has its weights.

        Yields:
            Rows of the tile, columns of the map, and the weights there, a view (B, r, s, heads, rows, columns, K, K).
        """
        for tile, left in enumerate(self.columns.query_start):
            for r, c in product(self.row_runs[row], self.column_runs[tile]):
                corner = spread[:, :, :, tile, :, r.first :, c.first :, r.start :, c.start :]
                *lead, by_row, by_column, by_key_row, by_key = corner.stride()
                strides = (*lead, by_row + r.step * by_key_row, by_column + c.step * by_key, by_key_row, by_key)
                band = corner.as_strided((*corner.shape[:4], r.count, c.count, *self.kernel), strides)
                columns = slice(left + c.first, left + c.first + c.count)
                yield slice(r.first, r.first + r.count), columns, band

    def spread(self, weights: Tensor, row: int, dtype: torch.dtype) -> Tensor:
        """The weights (B, r, s, heads, rows, W, K²) of a row of tiles as a dense matrix of queries and keys each."""
        *lead, heads, queries, _, _ = weights.shape
        tiles = len(self.columns.query_start)
        shape = (*lead, tiles, heads, queries, self.columns.queries, self.rows.keys, self.columns.keys)
        spread = weights.new_zeros(shape, dtype=dtype)
        weights = weights.unflatten(-1, self.kernel)
        for rows, columns, band in self.bands(spread, row):
            band.copy_(weights[..., rows, columns, :, :])
        return spread


def forward(weights, value, kernel_size, dilation):
    """One batched matrix product for each row of tiles, in at least float32."""
    out = empty_map(value)
    dtype = torch.promote_types(value.dtype, torch.float32)
    for maps in zip(*(residue_maps(x, dilation) for x in (weights, value, out)), strict=True):
        cover = _cover(maps[0].shape[4:6], kernel_size)
        for chunk, row, query_rows, key_rows in _rows_of_tiles(cover, maps[0]):
            w, v, o = (x[chunk] for x in maps)
            keys = gather(v[..., key_rows, :, :], cover.columns.key_start, cover.columns.keys, dtype)
            spread = cover.spread(w[..., query_rows, :, :], row, dtype).flatten(-2)
            result = (matrices(spread) @ matrices(keys)).view(*spread.shape[:-1], v.shape[-1])
            for tile, left in enumerate(cover.columns.query_start):
                o[..., query_rows, left : left + cover.columns.queries, :] = result[:, :, :, tile]
    return out


def backward(grad, weights, value, kernel_size, dilation):
    """Closed form on the tiles of the forward; sums in at least float32."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    gradients = tuple(empty_map(x, dtype).zero_() for x in (weights, value))
    for maps in zip(*(residue_maps(x, dilation) for x in (weights, value, grad, *gradients)), strict=True):
        cover = _cover(maps[0].shape[4:6], kernel_size)
        for chunk, row, query_rows, key_rows in _rows_of_tiles(cover, maps[0]):
            w, v, g, grad_w, grad_v = (x[chunk] for x in maps)
            keys = gather(v[..., key_rows, :, :], cover.columns.key_start, cover.columns.keys, dtype)
            grads = gather(g[..., query_rows, :, :], cover.columns.query_start, cover.columns.queries, dtype)
            # Without its gradient, a query that an earlier tile holds adds nothing.
            grads[..., : cover.rows.fresh[row], :, :] = 0
            drop_covered(grads, cover.columns.fresh)
            spread = cover.spread(w[..., query_rows, :, :], row, dtype)
            grad_spread = (matrices(grads) @ matrices(keys).transpose(-2, -1)).view(spread.shape)
            grad_w = grad_w[..., query_rows, :, :].unflatten(-1, kernel_size)
            for rows, columns, band in cover.bands(grad_spread, row):
                grad_w[..., rows, columns, :, :] += band
            grad_keys = (matrices(spread.flatten(-2)).transpose(-2, -1) @ matrices(grads)).view(keys.shape)
            add_tiles(grad_v[..., key_rows, :, :], grad_keys, cover.columns.key_start)
    return tuple(x.to(value.dtype) for x in gradients)


def _cover(shape: torch.Size, kernel: Sequence[int]) -> Cover:
    tiles, runs = (
        [function(length, size, 1) for length, size in zip(shape, kernel, strict=True)]
        for function in (axis_tiles, tile_runs)
    )
    return Cover(kernel, *tiles, *runs)


def _rows_of_tiles(cover: Cover, maps: Tensor) -> Iterator[tuple[tuple[slice, slice], int, slice, slice]]:
    """Images and residues at a time, a row of tiles, its rows of queries and its rows of keys."""
    rows, columns = cover.rows, cover.columns
    scores = rows.queries * rows.keys * len(columns.query_start) * columns.queries * columns.keys
    for chunk in chunks(scores, maps.shape[:3], maps.shape[3]):
        for row, (top, first) in enumerate(zip(rows.query_start, rows.key_start, strict=True)):
            yield chunk, row, slice(top, top + rows.queries), slice(first, first + rows.keys)
