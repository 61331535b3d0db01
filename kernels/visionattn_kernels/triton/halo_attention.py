"""Halo attention in Triton, the launchers: results allocated, tiles chosen, kernels run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.halo_attention_kernels import (
    halo_attention_bwd_key_value_kernel,
    halo_attention_bwd_query_kernel,
    halo_attention_fwd_kernel,
)
from visionattn_kernels.triton.launch import Launch, check_dtype, padded_dim, run
from visionattn_kernels.triton.tiles import Tiles, entry_of, tiles_per_head

# The tables, by bytes an element and padded channels of the wider of keys and values. The rule is that of routed
# attention: 64 queries or 8x8 keys a program, blocks of 64 in 16 bits and of 32 in 32, two stages. Where that spills a
# register on some chip, the entry is the first that does not of: 8 warps, half the block with 4 warps and with 8, a
# quarter of 16 or more with both, one stage with all of these, half the tile with the first four, a quarter likewise.
# Comments name the last choice that spilled and where; `tools/compile_kernels.py` shows that the entry does not.
# Windows of more than 16 keys an axis have twice the relative logits: the tables named WIDE hold what differs for them.
FORWARD = {
    (2, 16): Tiles(64, 64, 4, 2),
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 64, 4, 2),
    (2, 128): Tiles(64, 64, 8, 2),  # 4 warps: sm_80
    (4, 16): Tiles(64, 32, 4, 2),
    (4, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 128): Tiles(32, 32, 8, 2),  # 4 warps: sm_90
}
WIDE_FORWARD = {
    (4, 16): Tiles(64, 32, 8, 2),  # 4 warps: sm_90
    (4, 32): Tiles(64, 32, 8, 2),  # 4 warps: sm_80
}
BACKWARD_QUERY = {
    (2, 16): Tiles(64, 64, 4, 2),
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 32, 4, 2),  # block 64 with 8 warps: sm_80
    (2, 128): Tiles(64, 16, 8, 2),  # 4 warps: sm_100
    (4, 16): Tiles(64, 32, 4, 2),
    (4, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(32, 16, 8, 2),  # 4 warps: sm_90, in blocks of 16 queries
    (4, 128): Tiles(32, 16, 4, 2),  # block 32 with 8 warps: sm_80
}
WIDE_BACKWARD_QUERY = {
    (2, 64): Tiles(64, 16, 4, 2),  # block 32 with 8 warps: gfx942
    (4, 16): Tiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 32): Tiles(64, 16, 8, 2),  # 4 warps: sm_80
    (4, 128): Tiles(16, 32, 4, 2),  # tile 32, block 16 with 8 warps: gfx942
}
BACKWARD_KEY_VALUE = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 16, 4, 2),  # block 32 with 8 warps: sm_100
    (2, 64): Tiles((8, 8), 32, 4, 2),  # block 64 with 8 warps: sm_80
    (2, 128): Tiles((8, 8), 16, 8, 2),  # 4 warps: sm_80
    (4, 16): Tiles((8, 8), 32, 4, 2),
    (4, 32): Tiles((8, 8), 16, 8, 2),  # 4 warps: sm_80
    (4, 64): Tiles((8, 8), 16, 4, 2),  # block 32 with 8 warps: sm_80
    (4, 128): Tiles((8, 8), 16, 8, 2),  # 4 warps: sm_80
}
WIDE_BACKWARD_KEY_VALUE = {
    (2, 64): Tiles((8, 8), 16, 4, 2),  # block 32 with 8 warps: sm_80
    (4, 16): Tiles((8, 8), 32, 8, 2),  # 4 warps: sm_90
    (4, 64): Tiles((8, 8), 16, 8, 2),  # 4 warps: sm_80
}


class Settings(NamedTuple):
    """The settings of the op."""

    block_size: int
    halo_size: int
    stride: int
    scale: float

    @property
    def queries(self) -> int:
        """Queries of a block along each axis."""
        return self.block_size // self.stride

    @property
    def window(self) -> int:
        """Keys of a window along each axis."""
        return self.block_size + 2 * self.halo_size

    @property
    def side(self) -> int:
        """Relative logits that a query has along each axis, one for each key of its window, padded."""
        return max(16, triton.next_power_of_2(self.window))

    def tiles(self, table: dict, wide: dict, query: Tensor, value: Tensor) -> Tiles:
        """The entry of `table` for these tensors, or that of `wide` where there is one and windows are wide."""
        entry = entry_of(query, value)
        return wide.get(entry, table[entry]) if self.side > 16 else table[entry]


def forward_launches(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale):
    """Results of the forward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: The dtype or a head dim is not one that the kernels take.
    """
    check_dtype(query.dtype)
    settings = Settings(block_size, halo_size, stride, scale)
    out = empty_map(query, dim=value.shape[-1])
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    maps = {"query": query, "key": key, "value": value, "out": out}
    tiles = settings.tiles(FORWARD, WIDE_FORWARD, query, value)
    tables = (height_rel.contiguous(), width_rel.contiguous())
    return (out, lse), [_query_launch(halo_attention_fwd_kernel, tiles, (1, 1, 1), maps, tables, lse, settings)]


def backward_launches(grad, query, key, value, height_rel, width_rel, out, lse, block_size, halo_size, stride, scale):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Instead of the gradients of the tables there are their sums for each tile of queries, (tiles, 2, 2P-1, D) in
    float32.

    Raises:
        ValueError: As `forward_launches`.
    """
    check_dtype(query.dtype)
    settings = Settings(block_size, halo_size, stride, scale)
    grad_query, grad_key, grad_value = (empty_map(x) for x in (query, key, value))
    # Relative logits go from one kernel to the other in the precision in which the forward used them.
    logits = query.new_empty((*query.shape[:4], 2 * settings.side))
    maps = {"query": query, "key": key, "value": value, "grad": grad, "logits": logits}
    tables, delta = (height_rel.contiguous(), width_rel.contiguous()), torch.empty_like(lse)
    tiles = settings.tiles(BACKWARD_QUERY, WIDE_BACKWARD_QUERY, query, value)
    tile = _tile(tiles.tile, settings.queries**2)
    table_sums = lse.new_empty((_query_tiles(query, tile, settings), 2, *height_rel.shape))
    query_launch = _query_launch(
        halo_attention_bwd_query_kernel,
        tiles,
        (2, 1, 3),
        {**maps, "out": out, "grad_query": grad_query},
        tables,
        lse,
        settings,
        delta_ptr=delta,
        table_sums_ptr=table_sums,
    )
    key_value_launch = _key_value_launch({**maps, "grad_key": grad_key, "grad_value": grad_value}, lse, delta, settings)
    return (grad_query, grad_key, grad_value, table_sums), [query_launch, key_value_launch]


def _tile(most: int, positions: int) -> int:
    """Positions at once: a power of two, no more than hold them all, and at least 16, as `tl.dot` wants."""
    return min(most, max(16, triton.next_power_of_2(positions)))


def _query_tiles(query: Tensor, tile: int, settings: Settings) -> int:
    """Tiles of queries of all blocks, heads and images."""
    blocks = math.prod(query.shape[:2]) * tiles_per_head(query.shape[2:4], (settings.queries, settings.queries))
    return blocks * triton.cdiv(settings.queries**2, tile)


def _flops(query: Tensor, value: Tensor, products: tuple[int, int, int], settings: Settings) -> int:
    """The least of a kernel.

    Args:
        query: (B, heads, h, w, D)
        value: (B, heads, H, W, E)
        products: Of D and of E numbers for each pair of a query and a key, and of D for each query and table's row.
        settings: Those of the op.
    """
    positions = query[..., 0].numel()
    pairs, rows = positions * settings.window**2, positions * 2 * settings.window
    return 2 * ((products[0] * pairs + products[2] * rows) * query.shape[-1] + products[1] * pairs * value.shape[-1])


def _query_launch(
    kernel, tiles: Tiles, products, maps: dict[str, Tensor], tables, lse: Tensor, settings: Settings, **others: Any
) -> Launch:
    """The launch of `kernel` over all tiles of queries.

    Args:
        kernel: The kernel.
        tiles: How it is cut.
        products: As of `_flops`.
        maps: Arguments (B, heads, rows, columns, channels), passed with their strides.
        tables: Two of (2P-1, D), contiguous.
        lse: (B, heads, h, w)
        settings: Those of the op.
        others: Other arguments, passed as they are.
    """
    query, value = maps["query"], maps["value"]
    tile, block, num_warps, num_stages = tiles
    tile = _tile(tile, settings.queries**2)
    arguments = _arguments(maps, lse, settings) | {
        **others,
        "height_ptr": tables[0],
        "width_ptr": tables[1],
        "SPAN": max(16, triton.next_power_of_2(2 * settings.window - 1)),
        "CHUNK": min(32, padded_dim(query.shape[-1])),
        "TILE": tile,
        "BLOCK": _tile(block, settings.window**2),
    }
    flops = _flops(query, value, products, settings)
    return Launch(kernel, _query_tiles(query, tile, settings), arguments, num_warps, num_stages, flops)


def _key_value_launch(maps: dict[str, Tensor], lse: Tensor, delta: Tensor, settings: Settings) -> Launch:
    """The launch over all rectangles of keys; `maps` as of `_query_launch`, `lse` and `delta` (B, heads, h, w)."""
    query, key, value = maps["query"], maps["key"], maps["value"]
    tiles = settings.tiles(BACKWARD_KEY_VALUE, WIDE_BACKWARD_KEY_VALUE, query, value)
    tile, block, num_warps, num_stages = tiles
    block = _tile(block, settings.queries**2)
    arguments = _arguments(maps, lse, settings) | {"delta_ptr": delta, "TILE": tile, "BLOCK": block}
    programs = math.prod(key.shape[:2]) * tiles_per_head(key.shape[2:4], tile)
    flops = _flops(query, value, (2, 2, 0), settings)
    return Launch(halo_attention_bwd_key_value_kernel, programs, arguments, num_warps, num_stages, flops)


def _arguments(maps: dict[str, Tensor], lse: Tensor, settings: Settings) -> dict[str, Any]:
    """Arguments that all kernels have, but for tiles."""
    query, key, value = maps["query"], maps["key"], maps["value"]
    return {
        **{f"{name}_ptr": x for name, x in maps.items()},
        **{f"{name}_strides": x.stride() for name, x in maps.items()},
        "lse_ptr": lse,
        "lse_strides": lse.stride(),
        "query_size": tuple(query.shape[2:4]),
        "key_size": tuple(key.shape[2:4]),
        "heads": query.shape[1],
        "scale": settings.scale,
        "SIZE": settings.block_size,
        "HALO": settings.halo_size,
        "QUERIES": settings.queries,
        "SIDE": settings.side,
        "DIM": query.shape[-1],
        "DIM_E": value.shape[-1],
        "BLOCK_D": padded_dim(query.shape[-1]),
        "BLOCK_E": padded_dim(value.shape[-1]),
    }


def forward(query, key, value, height_rel, width_rel, block_size, halo_size, stride, scale):
    """The forward on a GPU; arguments and results as of the op."""
    settings = (block_size, halo_size, stride, scale)
    results, launches = forward_launches(query, key, value, height_rel, width_rel, *settings)
    run(launches, query.device)
    return results


def backward(grad, query, key, value, height_rel, width_rel, out, lse, block_size, halo_size, stride, scale):
    """The backward on a GPU; arguments and results as of the op."""
    settings = (block_size, halo_size, stride, scale)
    tensors = (grad, query, key, value, height_rel, width_rel, out, lse)
    (*grads, table_sums), launches = backward_launches(*tensors, *settings)
    run(launches, query.device)
    return *grads, *(sums.sum(0).to(query.dtype) for sums in table_sums.unbind(1))


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`, by variant, the one that does most last."""
    variants = {}
    # Blocks of HaloNet-H5, of HaloNet's layers that halve the map, and of most of its layers.
    for variant, side, block_size, stride in (("windows of 18", 48, 12, 1), ("stride 2", 56, 8, 2), ("", 56, 8, 1)):
        key = empty_map(torch.empty(1, 2, side, side, dim, dtype=dtype, device=device)).zero_()
        query = empty_map(key[:, :, ::stride, ::stride]).zero_()
        table = key.new_zeros(2 * block_size + 11, dim)
        settings = (block_size, 3, stride, dim**-0.5)
        (out, lse), forward_launch = forward_launches(query, key, key, table, table, *settings)
        _, backward_launch = backward_launches(query, query, key, key, table, table, out, lse, *settings)
        variants[variant] = forward_launch + backward_launch
    return variants
