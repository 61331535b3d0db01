"""Routed attention in Triton, the launchers: results allocated, routes inverted, tiles chosen, kernels run."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.launch import Launch, check_dtype, padded_dim, run
from visionattn_kernels.triton.routed_attention_kernels import (
    routed_attention_bwd_key_value_kernel,
    routed_attention_bwd_query_kernel,
    routed_attention_fwd_kernel,
)
from visionattn_kernels.triton.tiles import Tiles, entry_of

# The tables, by bytes an element and padded head dim. The rule: tiles of 64 tokens, because they fill the matrix
# instruction of four warps on every chip; blocks of 64 in 16 bits and of 32 in 32, which are equally many bytes; two
# stages, so that loads overlap with products. Where that spills a register on some chip, with small regions or large,
# the entry is the first that does not of: 8 warps, half the block with 4 warps and with 8, a quarter, one stage, half
# the tile. Comments name the last choice that spilled and where; `tools/compile_kernels.py` shows that the entry does
# not, for regions of 4 tokens and of 64.
FORWARD = {
    (2, 16): Tiles(64, 64, 8, 2),  # 4 warps: sm_100
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 64, 4, 2),
    (2, 128): Tiles(64, 64, 4, 2),
    (4, 16): Tiles(64, 32, 4, 2),
    (4, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 128): Tiles(64, 32, 8, 2),  # 4 warps: sm_80
}
BACKWARD_QUERY = {
    (2, 16): Tiles(64, 64, 4, 2),
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 64, 4, 2),
    (2, 128): Tiles(64, 32, 4, 2),  # block 64: sm_90, with 8 warps gfx942
    (4, 16): Tiles(64, 32, 4, 2),
    (4, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(64, 16, 4, 2),  # block 32 with 8 warps: sm_80
    (4, 128): Tiles(64, 16, 4, 2),  # block 32 with 8 warps: gfx942
}
BACKWARD_KEY_VALUE = {
    (2, 16): Tiles(64, 64, 4, 2),
    (2, 32): Tiles(64, 64, 4, 2),
    (2, 64): Tiles(64, 64, 4, 2),
    (2, 128): Tiles(64, 32, 4, 2),  # block 64: sm_80, with 8 warps gfx942
    (4, 16): Tiles(64, 32, 8, 2),  # 4 warps: sm_90
    (4, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(64, 16, 4, 2),  # block 32: sm_100, with 8 warps gfx942
    (4, 128): Tiles(64, 16, 8, 2),  # 4 warps: sm_100
}


def inverted(routes: Tensor) -> tuple[Tensor, Tensor]:
    """For each region, the regions that route to it; one that names it twice stands there twice.

    Args:
        routes: (B, R, K)

    Returns:
        sources: (B, R K) int32: for region 0, region 1 and so on the regions that route to it, in ascending order.
        bounds: (B, R + 1) int32: where in `sources` those of a region begin.
    """
    batch, regions, count = routes.shape
    named, order = routes.flatten(1).sort(stable=True)
    edges = torch.arange(regions + 1, device=routes.device).expand(batch, -1).contiguous()
    return (order // count).to(torch.int32), torch.searchsorted(named, edges, out_int32=True)


def forward_launches(query, key, value, routes, scale):
    """Results of the forward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: The dtype or the head dim is not one that the kernels take.
    """
    check_dtype(query.dtype)
    out = empty_map(query)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    maps = {"query": query, "key": key, "value": value, "out": out}
    others = {"lse_ptr": lse, "routes_ptr": routes.contiguous()}
    return (out, lse), [_launch(routed_attention_fwd_kernel, FORWARD, 2, maps, lse, routes, scale, others)]


def backward_launches(grad, query, key, value, routes, out, lse, scale):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: As `forward_launches`.
    """
    check_dtype(query.dtype)
    maps = {"query": query, "key": key, "value": value, "grad": grad}
    grad_query, grad_key, grad_value = (empty_map(query) for _ in range(3))
    sums = {"lse_ptr": lse, "delta_ptr": torch.empty_like(lse)}
    sources, bounds = inverted(routes)
    query_launch = _launch(
        routed_attention_bwd_query_kernel,
        BACKWARD_QUERY,
        3,
        {**maps, "out": out, "grad_query": grad_query},
        lse,
        routes,
        scale,
        {**sums, "routes_ptr": routes.contiguous()},
    )
    key_value_launch = _launch(
        routed_attention_bwd_key_value_kernel,
        BACKWARD_KEY_VALUE,
        4,
        {**maps, "grad_key": grad_key, "grad_value": grad_value},
        lse,
        routes,
        scale,
        {**sums, "sources_ptr": sources, "bounds_ptr": bounds},
    )
    return (grad_query, grad_key, grad_value), [query_launch, key_value_launch]


def _launch(
    kernel, table, products: int, maps: dict[str, Tensor], lse, routes, scale, others: dict[str, Any]
) -> Launch:
    """The launch of `kernel` over all tiles, cut as `table` says.

    Args:
        kernel: The kernel.
        table: Its tiles.
        products: Multiplications for each channel of each pair of a query and a key that it sees.
        maps: Arguments (B, heads, R, T, D), passed with their strides.
        lse: (B, heads, R, T)
        routes: (B, R, K)
        scale: Factor of the scores.
        others: Other arguments, passed as they are.
    """
    query = maps["query"]
    batch, heads, regions, tokens, dim = query.shape
    tile, block, num_warps, num_stages = table[entry_of(query)]
    tile = min(tile, max(16, triton.next_power_of_2(tokens)))
    arguments = {
        **{f"{name}_ptr": x for name, x in maps.items()},
        **{f"{name}_strides": x.stride() for name, x in maps.items()},
        **others,
        "lse_strides": lse.stride(),
        "heads": heads,
        "regions": regions,
        "tokens": tokens,
        "routes": routes.shape[2],
        "scale": scale,
        "TILE": tile,
        "BLOCK": block,
        "DIM": dim,
        "BLOCK_D": padded_dim(dim),
    }
    programs = batch * heads * regions * triton.cdiv(tokens, tile)
    flops = 2 * products * query.numel() * routes.shape[2] * tokens
    return Launch(kernel, programs, arguments, num_warps, num_stages, flops)


def forward(query, key, value, routes, scale):
    """The forward on a GPU; arguments and results as of the op."""
    results, launches = forward_launches(query, key, value, routes, scale)
    run(launches, query.device)
    return results


def backward(grad, query, key, value, routes, out, lse, scale):
    """The backward on a GPU; arguments and results as of the op."""
    results, launches = backward_launches(grad, query, key, value, routes, out, lse, scale)
    run(launches, query.device)
    return results


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`, by variant, the one that does most last."""
    variants = {}
    for variant, tokens, topk in (("regions of 4", 4, 16), ("", 64, 1)):
        query = empty_map(torch.empty(1, 2, 49, tokens, dim, dtype=dtype, device=device)).zero_()
        # Region r routes to r, r + 1 and so on: every region is named equally often.
        regions = torch.arange(49, device=device)
        routes = ((regions[:, None] + torch.arange(topk, device=device)) % 49)[None]
        (out, lse), forward_launch = forward_launches(query, query, query, routes, dim**-0.5)
        _, backward_launch = backward_launches(query, query, query, query, routes, out, lse, dim**-0.5)
        variants[variant] = forward_launch + backward_launch
    return variants
