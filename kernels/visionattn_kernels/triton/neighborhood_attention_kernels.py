"""Neighborhood attention in Triton, the kernels: one forward, two backward, nothing larger than the maps in memory.

A program owns a tile of queries (forward, gradient of the query) or of keys (gradients of key and value) of one residue
map of one head, and loops over blocks of whatever its windows reach: for queries the union of their windows, for keys
all queries whose window holds one of them, both contiguous. The gradient of the bias is summed a tile of queries at a
time and then over the tiles. Every result has one writer and one order of summation, so it is the same in every run.

Shapes: TILE and BLOCK stand for the products of their two numbers, rows times columns.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.relative_bias import bias_selectors, load_bias, spread_bias, store_bias, sum_pairs
from visionattn_kernels.triton.softmax import LOG2E, softmax_end, softmax_start, softmax_step
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
    window_holds,
)


@triton.jit
def _scores(
    query,
    key,
    bias,
    first,
    corner,
    members,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """[TILE, BLOCK] scores of the queries at `first` and the keys at `corner`; -inf where the key is not seen.

    In base 2, as `softmax.py` wants them. `bias` is [SPAN rows, SPAN columns] or None.
    """
    scores = tl.zeros([TILE[0] * TILE[1], BLOCK[0] * BLOCK[1]], tl.float32)
    if bias is not None:
        selectors = bias_selectors(first, corner, KERNEL, TILE, BLOCK, SPAN)
        scores = spread_bias(bias, selectors, TILE, BLOCK) * (1.0 / scale)
    scores = tl.dot(query, tl.trans(key), scores, input_precision="ieee") * (scale * LOG2E)
    own = tile_places(first[0], first[1], TILE)
    near = tile_places(corner[0], corner[1], BLOCK)
    return tl.where(window_holds(down(own), across(near), members, KERNEL, STRIDE), scores, float("-inf"))


@triton.jit
def neighborhood_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    size,
    dilation,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Results and logarithms of the softmax's sums of a tile of queries; online softmax over blocks of keys."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    inside = before(own, members)
    # [TILE, BLOCK_D]
    query = load_members(query_ptr, own, plane, inside, query_strides, DIM, BLOCK_D)
    bias = load_bias(bias_ptr, plane[1], KERNEL, SPAN) if bias_ptr is not None else None
    highest, total, out = softmax_start(TILE[0] * TILE[1], BLOCK_D)
    start, end = reach_of_queries(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        # [BLOCK, BLOCK_D]
        key = load_members(key_ptr, near, plane, before(near, end), key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, before(near, end), value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        scores = _scores(query, key, bias, first, corner, members, scale, KERNEL, STRIDE, TILE, BLOCK, SPAN)
        highest, total, out = softmax_step(scores, value, highest, total, out)
    out, lse = softmax_end(highest, total, out)
    store_members(out_ptr, out, own, plane, inside, out_strides, DIM, BLOCK_D)
    tl.store(member_pointers(lse_ptr, own, plane, lse_strides), lse, mask=inside)


@triton.jit
def neighborhood_attention_bwd_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    grad_query_ptr,
    bias_sums_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_strides,
    grad_query_strides,
    lse_strides,
    size,
    dilation,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a tile of queries, its share of the bias's, and sum(grad * out), which the next kernel reads."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    inside = before(own, members)
    # [TILE, BLOCK_D]
    query = load_members(query_ptr, own, plane, inside, query_strides, DIM, BLOCK_D)
    grad = load_members(grad_ptr, own, plane, inside, grad_strides, DIM, BLOCK_D)
    out = load_members(out_ptr, own, plane, inside, out_strides, DIM, BLOCK_D)
    # [TILE]
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(member_pointers(delta_ptr, own, plane, lse_strides), delta, mask=inside)
    # Beyond the map an infinite sum of the softmax makes the weights zero.
    lse = tl.load(member_pointers(lse_ptr, own, plane, lse_strides), mask=inside, other=float("inf")) * LOG2E
    bias = load_bias(bias_ptr, plane[1], KERNEL, SPAN) if bias_ptr is not None else None
    bias_sums = tl.zeros(SPAN, tl.float32)
    # [TILE, BLOCK_D]
    grad_query = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    start, end = reach_of_queries(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        # [BLOCK, BLOCK_D]
        key = load_members(key_ptr, near, plane, before(near, end), key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, before(near, end), value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        scores = _scores(query, key, bias, first, corner, members, scale, KERNEL, STRIDE, TILE, BLOCK, SPAN)
        weights = tl.exp2(scores - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        if bias_ptr is not None:
            bias_sums += sum_pairs(grad_scores, bias_selectors(first, corner, KERNEL, TILE, BLOCK, SPAN), TILE, BLOCK)
    store_members(grad_query_ptr, grad_query * scale, own, plane, inside, grad_query_strides, DIM, BLOCK_D)
    if bias_ptr is not None:
        store_bias(bias_sums_ptr, tl.program_id(0), bias_sums, KERNEL, SPAN)


@triton.jit
def neighborhood_attention_bwd_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    grad_key_strides,
    grad_value_strides,
    lse_strides,
    size,
    dilation,
    heads,
    scale,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a tile of keys and of its values, over blocks of the queries that see them."""
    plane, members, first = locate(size, dilation, heads, TILE)
    own = tile_places(first[0], first[1], TILE)
    inside = before(own, members)
    # [TILE, BLOCK_D]
    key = load_members(key_ptr, own, plane, inside, key_strides, DIM, BLOCK_D)
    value = load_members(value_ptr, own, plane, inside, value_strides, DIM, BLOCK_D)
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, plane[1], KERNEL, SPAN)
    # [TILE, BLOCK_D]
    grad_key = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    start, end = reach_of_keys(first, members, TILE, KERNEL, STRIDE)
    blocks, columns = block_count(start, end, BLOCK)
    for block in range(blocks):
        corner = block_corner(block, columns, start, BLOCK)
        near = tile_places(corner[0], corner[1], BLOCK)
        near_inside = before(near, end)
        # [BLOCK, BLOCK_D]
        query = load_members(query_ptr, near, plane, near_inside, query_strides, DIM, BLOCK_D)
        grad = load_members(grad_ptr, near, plane, near_inside, grad_strides, DIM, BLOCK_D)
        # [BLOCK]; infinite as in the kernel above
        lse = tl.load(member_pointers(lse_ptr, near, plane, lse_strides), mask=near_inside, other=float("inf")) * LOG2E
        delta = tl.load(member_pointers(delta_ptr, near, plane, lse_strides), mask=near_inside, other=0.0)
        # [TILE, BLOCK]
        scores = tl.zeros([TILE[0] * TILE[1], BLOCK[0] * BLOCK[1]], tl.float32)
        if bias_ptr is not None:
            selectors = bias_selectors(corner, first, KERNEL, BLOCK, TILE, SPAN)
            scores = tl.trans(spread_bias(bias, selectors, BLOCK, TILE)) * (1.0 / scale)
        scores = tl.dot(key, tl.trans(query), scores, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(window_holds(across(near), down(own), members, KERNEL, STRIDE), scores, float("-inf"))
        weights = tl.exp2(scores - lse[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
    store_members(grad_key_ptr, grad_key * scale, own, plane, inside, grad_key_strides, DIM, BLOCK_D)
    store_members(grad_value_ptr, grad_value, own, plane, inside, grad_value_strides, DIM, BLOCK_D)
