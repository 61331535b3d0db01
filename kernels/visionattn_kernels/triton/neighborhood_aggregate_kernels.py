"""Neighborhood aggregate in Triton, the kernels: one forward, two backward, nothing larger than the maps in memory.

A program owns a tile of queries (result, gradient of the weights) or of keys (gradient of the value) of one residue map
of one head, and loops over blocks of whatever its windows reach, as in `neighborhood_attention_kernels.py`. It spreads
weights over the pairs of a query and a key, which loads every weight once, and multiplies on the matrix units: with D
channels a weight of 16 bits takes part in D products for 2 bytes, more than the other units keep up with from D = 16
on. Every result has one writer and one order of summation.

Shapes: TILE and BLOCK stand for the products of their two numbers, rows times columns.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.windows import (
    across,
    before,
    block_corner,
    block_count,
    down,
    load_members,
    locate,
    member_pointers,
    reach_of_keys,
    reach_of_queries,
    store_members,
    tile_places,
    window_start,
)

# Windows begin anew with every query.
STRIDE = tl.constexpr((1, 1))


@triton.jit
def _entries(ptr, query, key, plane, members, strides, KERNEL: tl.constexpr):
    """The weights of pairs of a query and a key, both (rows, columns) that broadcast against each other.

    Returns:
        Pointers to them, in 64 bits, and which pairs have one.
    """
    row = key[0] - window_start(query[0], members[0], KERNEL[0], 1)
    column = key[1] - window_start(query[1], members[1], KERNEL[1], 1)
    seen = (row >= 0) & (row < KERNEL[0]) & (column >= 0) & (column < KERNEL[1])
    entry = (row * KERNEL[1] + column).to(tl.int64)
    return member_pointers(ptr, query, plane, strides) + entry * strides[4], seen & before(query, members)


@triton.jit
def neighborhood_aggregate_fwd_kernel(
    weights_ptr,
    value_ptr,
    out_ptr,
    weights_strides,
    value_strides,
    out_strides,
    size,
    dilation,
    heads,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Results of a tile of queries."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    # [TILE, BLOCK_D]
    out = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    start, end = reach_of_queries(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        # [BLOCK, BLOCK_D]
        value = load_members(value_ptr, near, plane, before(near, end), value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        pointers, seen = _entries(weights_ptr, down(own), across(near), plane, members, weights_strides, KERNEL)
        out = tl.dot(tl.load(pointers, mask=seen, other=0.0), value, out, input_precision="ieee")
    store_members(out_ptr, out, own, plane, before(own, members), out_strides, DIM, BLOCK_D)


@triton.jit
def neighborhood_aggregate_bwd_weights_kernel(
    grad_ptr,
    value_ptr,
    grad_weights_ptr,
    grad_strides,
    value_strides,
    grad_weights_strides,
    size,
    dilation,
    heads,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the weights of a tile of queries, each the product of one pair."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    # [TILE, BLOCK_D]
    grad = load_members(grad_ptr, own, plane, before(own, members), grad_strides, DIM, BLOCK_D)
    start, end = reach_of_queries(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        # [BLOCK, BLOCK_D]
        value = load_members(value_ptr, near, plane, before(near, end), value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        products = tl.dot(grad, tl.trans(value), input_precision="ieee")
        strides = grad_weights_strides
        pointers, seen = _entries(grad_weights_ptr, down(own), across(near), plane, members, strides, KERNEL)
        tl.store(pointers, products.to(grad_weights_ptr.dtype.element_ty), mask=seen)


@triton.jit
def neighborhood_aggregate_bwd_value_kernel(
    grad_ptr,
    weights_ptr,
    grad_value_ptr,
    grad_strides,
    weights_strides,
    grad_value_strides,
    size,
    dilation,
    heads,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the values of a tile of keys, over blocks of the queries whose windows hold them."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    # [TILE, BLOCK_D]
    grad_value = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    start, end = reach_of_keys(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        # [BLOCK, BLOCK_D]
        grad = load_members(grad_ptr, near, plane, before(near, end), grad_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        pointers, seen = _entries(weights_ptr, across(near), down(own), plane, members, weights_strides, KERNEL)
        grad_value = tl.dot(tl.load(pointers, mask=seen, other=0.0), grad, grad_value, input_precision="ieee")
    store_members(grad_value_ptr, grad_value, own, plane, before(own, members), grad_value_strides, DIM, BLOCK_D)
