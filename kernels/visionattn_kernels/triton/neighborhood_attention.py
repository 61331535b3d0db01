"""Neighborhood attention in Triton, the launchers: results allocated, tiles chosen, kernels run."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.launch import Launch, check_dtype, padded_dim, run
from visionattn_kernels.triton.neighborhood_attention_kernels import (
    neighborhood_attention_bwd_key_value_kernel,
    neighborhood_attention_bwd_query_kernel,
    neighborhood_attention_fwd_kernel,
)
from visionattn_kernels.triton.tiles import Tiles, block_shape, entry_of, tiles_per_head

# The tables, by bytes an element and padded head dim. The rule: 8x8 members a program, because 64 rows fill the matrix
# instruction of four warps on every chip and a square has the smallest halo; blocks of 64 in 16 bits and of 32 in 32,
# which are equally many bytes; two stages, so that loads overlap with products. Where that spills a register on some
# chip, with or without a bias, the entry is the first that does not of: 8 warps, one stage, a smaller block, a smaller
# tile. Comments name the last choice that spilled and where; `tools/compile_kernels.py` shows that the entry does not.
FORWARD = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 64, 4, 2),
    (2, 64): Tiles((8, 8), 64, 8, 2),  # 4 warps: sm_80
    (2, 128): Tiles((8, 8), 32, 4, 2),  # block 64: sm_80; with one stage none, but then loads do not overlap
    (4, 16): Tiles((8, 8), 32, 4, 2),
    (4, 32): Tiles((8, 8), 32, 4, 2),
    (4, 64): Tiles((8, 8), 16, 8, 2),  # 4 warps: sm_90
    (4, 128): Tiles((4, 4), 16, 4, 1),  # tile 4x8: sm_100, with 8 warps sm_90
}
BACKWARD_QUERY = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 64, 4, 2),
    (2, 64): Tiles((8, 8), 32, 4, 1),  # block 64 and two stages: sm_80
    (2, 128): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80
    (4, 16): Tiles((8, 8), 32, 8, 2),  # 4 warps: sm_80
    (4, 32): Tiles((8, 8), 32, 4, 1),  # two stages: sm_90, with 8 warps sm_80
    (4, 64): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80, with 8 warps gfx942
    (4, 128): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80
}
BACKWARD_KEY_VALUE = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 32, 4, 2),  # block 64: sm_80, with one stage sm_100
    (2, 64): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80
    (2, 128): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80, with 8 warps gfx942; with one stage none up to K = 7
    (4, 16): Tiles((8, 8), 32, 8, 2),  # 4 warps: sm_80
    (4, 32): Tiles((8, 8), 32, 4, 2),
    (4, 64): Tiles((8, 8), 16, 4, 2),  # block 32: sm_80
    (4, 128): Tiles((4, 8), 16, 4, 2),  # tile 8x8: sm_80, with 8 warps gfx942
}


def forward_launches(query, key, value, bias, kernel_size, stride, dilation, scale):
    """Results of the forward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: The dtype, the head dim or the scale is not one that the kernels take.
    """
    _check(query, bias, scale)
    out = empty_map(query)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    maps = {"query": query, "key": key, "value": value, "out": out}
    settings = (kernel_size, stride, dilation, scale)
    return (out, lse), [_launch(neighborhood_attention_fwd_kernel, FORWARD, 2, maps, lse, bias, settings)]


def backward_launches(grad, query, key, value, bias, out, lse, kernel_size, stride, dilation, scale):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Instead of the gradient of the bias there are its sums for each tile of queries, (B, heads, tiles, 2K-1, 2K-1) in
    float32, None without a bias.

    Raises:
        ValueError: As `forward_launches`.
    """
    _check(query, bias, scale)
    settings = (kernel_size, stride, dilation, scale)
    maps = {"query": query, "key": key, "value": value, "grad": grad}
    grad_query, grad_key, grad_value = (empty_map(query) for _ in range(3))
    delta = torch.empty_like(lse)
    bias_sums = None
    if bias is not None:
        tiles = tiles_per_head(query.shape[2:4], BACKWARD_QUERY[entry_of(query)].tile, dilation)
        bias_sums = query.new_empty((*query.shape[:2], tiles, *bias.shape[1:]), dtype=torch.float32)
    query_launch = _launch(
        neighborhood_attention_bwd_query_kernel,
        BACKWARD_QUERY,
        3,
        {**maps, "out": out, "grad_query": grad_query},
        lse,
        bias,
        settings,
        delta_ptr=delta,
        bias_sums_ptr=bias_sums,
    )
    key_value_launch = _launch(
        neighborhood_attention_bwd_key_value_kernel,
        BACKWARD_KEY_VALUE,
        4,
        {**maps, "grad_key": grad_key, "grad_value": grad_value},
        lse,
        bias,
        settings,
        delta_ptr=delta,
    )
    return (grad_query, grad_key, grad_value, bias_sums), [query_launch, key_value_launch]


def _check(query: Tensor, bias: Tensor | None, scale: float) -> None:
    """Raise ValueError where the kernels cannot compute what the other paths can."""
    check_dtype(query.dtype)
    if bias is not None and scale == 0:
        raise ValueError("with a bias the scale must not be 0: the kernels multiply their sum by it, got 0")


def _launch(kernel, table, products: int, maps: dict[str, Tensor], lse, bias, settings, **others: Any) -> Launch:
    """The launch of `kernel` over all tiles, cut as `table` says.

    Args:
        kernel: The kernel.
        table: Its tiles.
        products: Multiplications for each channel of each pair of a query and a key that it sees.
        maps: Arguments (B, heads, H, W, D), passed with their strides.
        lse: (B, heads, H, W)
        bias: (heads, 2K-1, 2K-1) or None
        settings: kernel_size, stride, dilation and scale.
        others: Other arguments, passed as they are.
    """
    kernel_size, stride, dilation, scale = settings
    query = maps["query"]
    batch, heads, height, width, dim = query.shape
    tile, block, num_warps, num_stages = table[entry_of(query)]
    arguments = {
        **{f"{name}_ptr": x for name, x in maps.items()},
        **{f"{name}_strides": x.stride() for name, x in maps.items()},
        **others,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "lse_ptr": lse,
        "lse_strides": lse.stride(),
        "size": (height, width),
        "dilation": tuple(dilation),
        "heads": heads,
        "scale": scale,
        "KERNEL": tuple(kernel_size),
        "STRIDE": tuple(stride),
        "TILE": tile,
        "BLOCK": block_shape(tile, tuple(kernel_size), block),
        "SPAN": tuple(max(16, triton.next_power_of_2(2 * size - 1)) for size in kernel_size),
        "DIM": dim,
        "BLOCK_D": padded_dim(dim),
    }
    programs = batch * heads * tiles_per_head((height, width), tile, dilation)
    flops = 2 * products * query.numel() * math.prod(kernel_size)
    return Launch(kernel, programs, arguments, num_warps, num_stages, flops)


def forward(query, key, value, bias, kernel_size, stride, dilation, scale):
    """The forward on a GPU; arguments and results as of the op."""
    results, launches = forward_launches(query, key, value, bias, kernel_size, stride, dilation, scale)
    run(launches, query.device)
    return results


def backward(grad, query, key, value, bias, out, lse, kernel_size, stride, dilation, scale):
    """The backward on a GPU; arguments and results as of the op."""
    settings = (kernel_size, stride, dilation, scale)
    (*grads, bias_sums), launches = backward_launches(grad, query, key, value, bias, out, lse, *settings)
    run(launches, query.device)
    grad_bias = query.new_empty(0) if bias is None else bias_sums.sum((0, 2)).to(bias.dtype)
    return *grads, grad_bias


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`, by variant, the one that does most last."""
    query = empty_map(torch.empty(1, 2, 56, 56, dim, dtype=dtype, device=device)).zero_()
    settings = ((7, 7), (1, 1), (1, 1), dim**-0.5)
    variants = {}
    for variant, bias in (("", None), ("bias", query.new_zeros(2, 13, 13))):
        (out, lse), forward_launch = forward_launches(query, query, query, bias, *settings)
        _, backward_launch = backward_launches(query, query, query, query, bias, out, lse, *settings)
        variants[variant] = forward_launch + backward_launch
    return variants
