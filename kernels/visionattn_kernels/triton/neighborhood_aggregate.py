"""Neighborhood aggregate in Triton, the launchers: results allocated, tiles chosen, kernels run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.launch import Launch, check_dtype, padded_dim, run
from visionattn_kernels.triton.neighborhood_aggregate_kernels import (
    neighborhood_aggregate_bwd_value_kernel,
    neighborhood_aggregate_bwd_weights_kernel,
    neighborhood_aggregate_fwd_kernel,
)
from visionattn_kernels.triton.tiles import Tiles, block_shape, entry_of, tiles_per_head

# The tables, by bytes an element and padded head dim. The rule is that of neighborhood attention: 8x8 members a
# program, blocks of 64 in 16 bits and of 32 in 32, two stages. Where that spills a register on some chip, the entry is
# the first that does not of: 8 warps, half the block with 4 warps. Comments name the last choice that spilled and
# where; `tools/compile_kernels.py` shows that the entry does not.
FORWARD = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 64, 4, 2),
    (2, 64): Tiles((8, 8), 64, 4, 2),
    (2, 128): Tiles((8, 8), 64, 4, 2),
    (4, 16): Tiles((8, 8), 32, 4, 2),
    (4, 32): Tiles((8, 8), 32, 4, 2),
    (4, 64): Tiles((8, 8), 32, 8, 2),  # 4 warps: sm_80
    (4, 128): Tiles((8, 8), 16, 4, 2),  # block 32 with 8 warps: sm_80
}
BACKWARD_WEIGHTS = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 64, 4, 2),
    (2, 64): Tiles((8, 8), 64, 4, 2),
    (2, 128): Tiles((8, 8), 64, 4, 2),
    (4, 16): Tiles((8, 8), 32, 4, 2),
    (4, 32): Tiles((8, 8), 32, 4, 2),
    (4, 64): Tiles((8, 8), 32, 8, 2),  # 4 warps: sm_80
    (4, 128): Tiles((8, 8), 32, 4, 2),
}
BACKWARD_VALUE = {
    (2, 16): Tiles((8, 8), 64, 4, 2),
    (2, 32): Tiles((8, 8), 64, 4, 2),
    (2, 64): Tiles((8, 8), 64, 4, 2),
    (2, 128): Tiles((8, 8), 64, 4, 2),
    (4, 16): Tiles((8, 8), 32, 4, 2),
    (4, 32): Tiles((8, 8), 32, 4, 2),
    (4, 64): Tiles((8, 8), 32, 4, 2),
    (4, 128): Tiles((8, 8), 32, 4, 2),
}


def forward_launches(weights, value, kernel_size, dilation):
    """Result of the forward, not yet filled, and the launches that fill it; arguments and result as of the op.

    Raises:
        ValueError: The dtype or the head dim is not one that the kernels take.
    """
    check_dtype(value.dtype)
    out = empty_map(value)
    maps = {"weights": weights, "value": value, "out": out}
    return out, [_launch(neighborhood_aggregate_fwd_kernel, FORWARD, maps, value, kernel_size, dilation)]


def backward_launches(grad, weights, value, kernel_size, dilation):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: As `forward_launches`.
    """
    check_dtype(value.dtype)
    grad_weights, grad_value = empty_map(weights), empty_map(value)
    by_weights = {"grad": grad, "value": value, "grad_weights": grad_weights}
    by_value = {"grad": grad, "weights": weights, "grad_value": grad_value}
    settings = (value, kernel_size, dilation)
    return (grad_weights, grad_value), [
        _launch(neighborhood_aggregate_bwd_weights_kernel, BACKWARD_WEIGHTS, by_weights, *settings),
        _launch(neighborhood_aggregate_bwd_value_kernel, BACKWARD_VALUE, by_value, *settings),
    ]


def _launch(kernel, table, maps: dict[str, Tensor], value: Tensor, kernel_size, dilation) -> Launch:
    """The launch of `kernel` over all tiles, cut as `table` says; `maps` are passed with their strides."""
    batch, heads, height, width, dim = value.shape
    tile, block, num_warps, num_stages = table[entry_of(value)]
    arguments = {
        **{f"{name}_ptr": x for name, x in maps.items()},
        **{f"{name}_strides": x.stride() for name, x in maps.items()},
        "size": (height, width),
        "dilation": tuple(dilation),
        "heads": heads,
        "KERNEL": tuple(kernel_size),
        "TILE": tile,
        "BLOCK": block_shape(tile, tuple(kernel_size), block),
        "DIM": dim,
        "BLOCK_D": padded_dim(dim),
    }
    programs = batch * heads * tiles_per_head((height, width), tile, dilation)
    flops = 2 * value.numel() * math.prod(kernel_size)
    return Launch(kernel, programs, arguments, num_warps, num_stages, flops)


def forward(weights, value, kernel_size, dilation):
    """The forward on a GPU; arguments and result as of the op."""
    out, launches = forward_launches(weights, value, kernel_size, dilation)
    run(launches, value.device)
    return out


def backward(grad, weights, value, kernel_size, dilation):
    """The backward on a GPU; arguments and results as of the op."""
    results, launches = backward_launches(grad, weights, value, kernel_size, dilation)
    run(launches, value.device)
    return results


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`."""
    value = empty_map(torch.empty(1, 2, 56, 56, dim, dtype=dtype, device=device)).zero_()
    weights = value.new_zeros(1, 2, 56, 56, 13**2)
    out, forward_launch = forward_launches(weights, value, (13, 13), (1, 1))
    _, backward_launch = backward_launches(out, weights, value, (13, 13), (1, 1))
    return {"": forward_launch + backward_launch}
