"""How the CPU paths of the windowed operators cover a map: query tiles, the keys each needs, and an additive mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn_kernels.ops.windows import window_offsets, window_start

# Queries a tile and axis. A tile of T queries reads T + K - 1 keys an axis: smaller tiles compute fewer masked scores,
# larger ones make better matrix products. With K = 7, 7 and 8 were fastest or within 15 % of it from 14x14 to 128x160.
TILE = 8
# Rows a tile where keys are copied once for all rows (`gather` of a whole map) and the map has more than two `TILE`s. A
# tile of 2x8 queries computes 0.6 times the scores a query of one of 8x8. One call of SDPA takes many rows of tiles, so
# that it prefers the flattest; matrix products that take one row of tiles a call are better off with larger ones.
ROWS = 2
ROWS_ALONE = 4

# Scores computed at once on the CPU: 4 MiB in float32, so that they stay in the second-level cache.
SCORES_AT_ONCE = 2**20


class AxisTiles(NamedTuple):
    """How query tiles cover one axis. All tiles have the same size, so that they batch; the last one may overlap.

    Attributes:
        queries: Queries a tile.
        keys: Keys a tile: enough for the union of its queries' windows.
        query_start: First query of each tile.
        key_start: First key of each tile.
        fresh: Number of leading queries of each tile that an earlier tile has already covered.
        offsets: (tiles, queries, keys) as in `window_offsets`, local to each tile.
    """

    queries: int
    keys: int
    query_start: list[int]
    key_start: list[int]
    fresh: list[int]
    offsets: Tensor


@lru_cache(maxsize=256)
def axis_tiles(length: int, kernel: int, stride: int, tile: int = TILE) -> AxisTiles:
    """Cover an axis of `length` members with query tiles of nearly `tile` queries."""
    count = -(-length // tile)
    size = -(-length // count)
    start = window_start(torch.arange(length), length, kernel, stride).tolist()
    query_start = [min(number * size, length - size) for number in range(count)]
    keys = max(start[first + size - 1] + kernel - start[first] for first in query_start)
    key_start = [min(start[first], length - keys) for first in query_start]
    offsets = window_offsets(length, kernel, stride, 1)
    local = [offsets[q : q + size, k : k + keys] for q, k in zip(query_start, key_start, strict=True)]
    fresh = [number * size - first for number, first in enumerate(query_start)]
    return AxisTiles(size, keys, query_start, key_start, fresh, torch.stack(local))


class Run(NamedTuple):
    """Consecutive queries of a tile whose windows start `step` keys apart."""

    first: int
    count: int
    start: int
    step: int


@lru_cache(maxsize=256)
def tile_runs(length: int, kernel: int, stride: int) -> list[list[Run]]:
    """The runs of each of the `axis_tiles`, with positions local to the tile."""
    starts = (axis_tiles(length, kernel, stride).offsets >= 0).int().argmax(-1).tolist()
    return [_runs(tile) for tile in starts]


def _runs(starts: list[int]) -> list[Run]:
    runs, first = [], 0
    while first < len(starts):
        last, step = first, starts[first + 1] - starts[first] if first + 1 < len(starts) else 0
        while last + 1 < len(starts) and starts[last + 1] - starts[last] == step:
            last += 1
        runs.append(Run(first, last + 1 - first, starts[first], step))
        first = last + 1
    return runs


class RowGroup(NamedTuple):
    """Rows of tiles one below the other that share a mask and follow each other evenly.

    Attributes:
        pattern: As in `TilePlan`.
        tiles: Rows of tiles.
        queries, keys: Rows of the map that hold the queries and the keys of all of them.
    """

    pattern: int
    tiles: int
    queries: slice
    keys: slice


class TilePlan(NamedTuple):
    """How query tiles cover a map of one residue class per axis. Tiles of a row are computed together.

    Attributes:
        rows, columns: Tiles along each axis.
        pattern: For each row of tiles, the entry of `index` and `mask` that is its own.
        groups: All rows of tiles, in order.
        index: (patterns, columns, queries, keys) int32 into the flattened relative bias with one entry appended, that
            of the keys outside the window; queries and keys of a tile are flattened row-major.
        mask: (patterns, columns, 1, queries, keys) 0 where the query sees the key and -inf elsewhere.
    """

    rows: AxisTiles
    columns: AxisTiles
    pattern: list[int]
    groups: list[RowGroup]
    index: Tensor
    mask: Tensor

    def bias_mask(self, bias: Tensor) -> Tensor:
        """`mask` with a relative bias (heads, 2K-1, 2K-1) in place of its zeros: (patterns, columns, heads, ...)."""
        heads = len(bias)
        entries = torch.cat([bias.flatten(1), bias.new_full((heads, 1), float("-inf"))], dim=1)
        filled = entries.index_select(1, self.index.flatten()).view(heads, *self.index.shape)
        return filled.permute(1, 2, 0, 3, 4).contiguous()


@lru_cache(maxsize=64)
def tile_plan(
    shape: tuple[int, int], kernel_size: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype, rows: int
) -> TilePlan:
    """Cover a map of `shape` (rows, columns) with tiles; the mask has `dtype`. Cached, at most 64 plans.

    `rows` are those of a tile where the map has more than two `TILE`s: `ROWS` or `ROWS_ALONE`.
    """
    # Queries that share a window belong in a tile.
    height = max(rows, stride[0]) if shape[0] > 2 * TILE else TILE
    axes = zip(shape, kernel_size, stride, (height, TILE), strict=True)
    rows, columns = (axis_tiles(*axis) for axis in axes)
    patterns, pattern = torch.unique(rows.offsets, dim=0, return_inverse=True)
    pattern = pattern.tolist()
    row = patterns[:, None, :, None, :, None]
    column = columns.offsets[None, :, None, :, None, :]
    outside = (2 * kernel_size[0] - 1) * (2 * kernel_size[1] - 1)
    index = torch.where((row < 0) | (column < 0), outside, row * (2 * kernel_size[1] - 1) + column)
    index = index.flatten(4, 5).flatten(2, 3).int()
    mask = torch.zeros(index.shape, dtype=dtype).masked_fill_(index == outside, float("-inf"))
    return TilePlan(rows, columns, pattern, _row_groups(rows, pattern), index, mask.unsqueeze(2))


def _row_groups(rows: AxisTiles, pattern: list[int]) -> list[RowGroup]:
    """Group tiles of an axis whose queries and keys both start `queries` after those of the tile before."""
    groups = []
    for tile, (query, key) in enumerate(zip(rows.query_start, rows.key_start, strict=True)):
        queries, keys = slice(query, query + rows.queries), slice(key, key + rows.keys)
        last = groups[-1] if groups else None
        if (
            last
            and last.pattern == pattern[tile]
            and (query, keys.stop - last.keys.stop) == (last.queries.stop, rows.queries)
        ):
            groups[-1] = RowGroup(
                last.pattern, last.tiles + 1, slice(last.queries.start, queries.stop), slice(last.keys.start, keys.stop)
            )
        else:
            groups.append(RowGroup(pattern[tile], 1, queries, keys))
    return groups


def residue_maps(x: Tensor, dilation: tuple[int, int]) -> Iterator[Tensor]:
    """Split a map into the maps of its residue classes, as views.

    Classes of an axis differ by one member where the dilation does not divide its length, so there are at most two
    sizes an axis, and at most four views in all.

    Args:
        x: (B, heads, H, W, D), any strides.
        dilation: Dilation per axis.

    Yields:
        (B, row residues, column residues, heads, rows, columns, D)
    """
    for first_row, row_count in _residues(x.shape[2], dilation[0]):
        for first_column, column_count in _residues(x.shape[3], dilation[1]):
            part = x[:, :, first_row:, first_column:]
            part = part.unfold(2, row_count, dilation[0]).unfold(3, column_count, dilation[1])
            yield part.permute(0, 5, 6, 1, 2, 3, 4)


def _residues(length: int, dilation: int) -> list[tuple[int, int]]:
    """(first, count) of the residues with one member more than the others, and of the others."""
    longer = length % dilation
    return ([(0, longer)] if longer else []) + [(longer, dilation - longer)]


def chunks(scores: int, lead: torch.Size, heads: int) -> Iterator[tuple[slice, slice]]:
    """Split the work on a row of tiles to `SCORES_AT_ONCE`.

    Args:
        scores: Of one row of tiles, head and residue.
        lead: (B, row residues, column residues)
        heads: Heads.

    Yields:
        Images and row residues.
    """
    per_row = lead[2] * heads * scores
    batch_step = max(1, SCORES_AT_ONCE // max(1, lead[1] * per_row))
    row_step = min(lead[1], max(1, SCORES_AT_ONCE // max(1, per_row)))
    for first in range(0, lead[0], batch_step):
        for row in range(0, lead[1], row_step):
            yield slice(first, first + batch_step), slice(row, row + row_step)


def gather(x: Tensor, starts: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """Copy the tiles of a row of tiles, or strips of columns that all rows of tiles share.

    Args:
        x: (B, r, s, heads, rows, columns, D) the rows of the map that the row of tiles needs, or all of them.
        starts: First column of each tile.
        size: Columns of a tile.
        dtype: That of the result.

    Returns:
        (B, r, s, tiles, heads, rows, size, D) contiguous.
    """
    batch, r, s, heads, rows, _, dim = x.shape
    tiles = x.new_empty((batch, r, s, len(starts), heads, rows, size, dim), dtype=dtype)
    first = 0
    while first < len(starts):
        # One copy for all tiles that follow each other at the same distance, if there is one.
        end, step = first + 1, max(1, starts[first + 1] - starts[first]) if first + 1 < len(starts) else 1
        while end < len(starts) and starts[end] - starts[end - 1] == step:
            end += 1
        windows = x[..., starts[first] : starts[end - 1] + size, :].unfold(-2, size, step)
        tiles[:, :, :, first:end] = windows.movedim(-3, 3).transpose(-2, -1)
        first = end
    return tiles


def add_tiles(x: Tensor, tiles: Tensor, starts: Sequence[int]) -> None:
    """Add what `gather` would copy, or its gradient, back to the rows that it was copied from."""
    for tile, start in enumerate(starts):
        x[..., start : start + tiles.shape[6], :] += tiles[:, :, :, tile]


def put_tiles(x: Tensor, tiles: Tensor, fresh: Sequence[int]) -> None:
    """Write tiles of queries back to where `gather` copied them from, but for the first `fresh` columns of each.

    The axis of rows may be split in two, in `x` and in `tiles`.
    """
    size, whole = tiles.shape[-2], fresh.count(0)
    x[..., : whole * size, :].unflatten(-2, (whole, size)).movedim(-3, 3).copy_(tiles[:, :, :, :whole])
    if whole < len(fresh):  # the last tile overlaps the one before it
        x[..., whole * size :, :] = tiles[:, :, :, -1, ..., fresh[-1] :, :]


def drop_covered(tiles: Tensor, fresh: Sequence[int]) -> None:
    """Zero the first `fresh` columns of each tile, so that a query that two tiles cover counts once."""
    for tile, left in enumerate(fresh):
        tiles[:, :, :, tile, ..., :left, :] = 0


def matrices(tiles: Tensor) -> Tensor:
    """(B, r, s, tiles, heads, rows, columns, D) as (B r s, tiles heads, rows columns, D)."""
    return tiles.flatten(5, 6).flatten(3, 4).flatten(0, 2)
