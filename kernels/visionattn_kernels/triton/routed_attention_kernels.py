"""Routed attention in Triton, the kernels: one forward, two backward; the routed regions are read where they are.

A program owns a tile of tokens of one region of one head. The keys that its queries see are the tokens of the routed
regions, counted through: key number j is token j % T of the region that route j // T names, so that a block of keys is
full whatever the size of a region. The gradients of keys and values run over the queries in the same way, through the
list of the regions that route to a region. Every result has one writer and one order of summation: no atomics.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.softmax import LOG2E, softmax_end, softmax_start, softmax_step
from visionattn_kernels.triton.windows import load_members, member_pointers, store_members, whole_plane


@triton.jit
def _locate(heads, regions, tokens, TILE: tl.constexpr):
    """What this program owns: a tile of tokens of one region of one head.

    Returns:
        plane: Image and head; for `load_members`, to which a region is a row and a token a column.
        own: Region, and [TILE] numbers of the tokens within it.
        inside: [TILE] which of these tokens exist.
    """
    tiles = tl.cdiv(tokens, TILE)
    program = tl.program_id(0)
    rest = program // tiles
    image_head = rest // regions
    token = program % tiles * TILE + tl.arange(0, TILE)
    return whole_plane(image_head // heads, image_head % heads), (rest % regions, token), token < tokens


@triton.jit
def _region_list(plane, region, regions, routes):
    """Number of the first of the `routes` numbers that belong to a region, in an array (B, R, routes)."""
    return (plane[0].to(tl.int64) * regions + region) * routes


@triton.jit
def _listed(list_ptr, first, count, tokens, BLOCK: tl.constexpr):
    """A block of the tokens of listed regions, from number `first`.

    Returns:
        Their regions and their numbers within them, [BLOCK] each, and [BLOCK] which of them are before `count`.
    """
    number = first + tl.arange(0, BLOCK)
    inside = number < count
    return (tl.load(list_ptr + number // tokens, mask=inside, other=0), number % tokens), inside


@triton.jit
def routed_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    routes_ptr,
    out_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    heads,
    regions,
    tokens,
    routes,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Results and logarithms of the softmax's sums of a tile of queries; online softmax over blocks of keys."""
    plane, own, inside = _locate(heads, regions, tokens, TILE)
    # [TILE, BLOCK_D]
    query = load_members(query_ptr, own, plane, inside, query_strides, DIM, BLOCK_D)
    highest, total, out = softmax_start(TILE, BLOCK_D)
    list_ptr = routes_ptr + _region_list(plane, own[0], regions, routes)
    for first in range(0, routes * tokens, BLOCK):
        near, listed = _listed(list_ptr, first, routes * tokens, tokens, BLOCK)
        # [BLOCK, BLOCK_D]
        key = load_members(key_ptr, near, plane, listed, key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, listed, value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(listed[None, :], scores, float("-inf"))
        highest, total, out = softmax_step(scores, value, highest, total, out)
    out, lse = softmax_end(highest, total, out)
    store_members(out_ptr, out, own, plane, inside, out_strides, DIM, BLOCK_D)
    tl.store(member_pointers(lse_ptr, own, plane, lse_strides), lse, mask=inside)


@triton.jit
def routed_attention_bwd_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    routes_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    grad_query_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_strides,
    grad_query_strides,
    lse_strides,
    heads,
    regions,
    tokens,
    routes,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a tile of queries, and sum(grad * out), which the next kernel reads."""
    plane, own, inside = _locate(heads, regions, tokens, TILE)
    # [TILE, BLOCK_D]
    query = load_members(query_ptr, own, plane, inside, query_strides, DIM, BLOCK_D)
    grad = load_members(grad_ptr, own, plane, inside, grad_strides, DIM, BLOCK_D)
    out = load_members(out_ptr, own, plane, inside, out_strides, DIM, BLOCK_D)
    # [TILE]
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(member_pointers(delta_ptr, own, plane, lse_strides), delta, mask=inside)
    lse = tl.load(member_pointers(lse_ptr, own, plane, lse_strides), mask=inside, other=float("inf")) * LOG2E
    # [TILE, BLOCK_D]
    grad_query = tl.zeros([TILE, BLOCK_D], tl.float32)
    list_ptr = routes_ptr + _region_list(plane, own[0], regions, routes)
    for first in range(0, routes * tokens, BLOCK):
        near, listed = _listed(list_ptr, first, routes * tokens, tokens, BLOCK)
        # [BLOCK, BLOCK_D]; keys beyond the last are zero and add nothing
        key = load_members(key_ptr, near, plane, listed, key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, listed, value_strides, DIM, BLOCK_D)
        # [TILE, BLOCK]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(listed[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
    store_members(grad_query_ptr, grad_query * scale, own, plane, inside, grad_query_strides, DIM, BLOCK_D)


@triton.jit
def routed_attention_bwd_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    sources_ptr,
    bounds_ptr,
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
    heads,
    regions,
    tokens,
    routes,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a tile of keys and of its values, over blocks of the queries whose regions route to its region."""
    plane, own, inside = _locate(heads, regions, tokens, TILE)
    # [TILE, BLOCK_D]
    key = load_members(key_ptr, own, plane, inside, key_strides, DIM, BLOCK_D)
    value = load_members(value_ptr, own, plane, inside, value_strides, DIM, BLOCK_D)
    grad_key = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE, BLOCK_D], tl.float32)
    bound_ptr = bounds_ptr + plane[0].to(tl.int64) * (regions + 1) + own[0]
    start = tl.load(bound_ptr)
    count = (tl.load(bound_ptr + 1) - start) * tokens
    list_ptr = sources_ptr + _region_list(plane, 0, regions, routes) + start
    for first in range(0, count, BLOCK):
        near, listed = _listed(list_ptr, first, count, tokens, BLOCK)
        # [BLOCK, BLOCK_D]
        query = load_members(query_ptr, near, plane, listed, query_strides, DIM, BLOCK_D)
        grad = load_members(grad_ptr, near, plane, listed, grad_strides, DIM, BLOCK_D)
        # [BLOCK]; beyond the last query an infinite sum of the softmax makes the weights zero
        lse = tl.load(member_pointers(lse_ptr, near, plane, lse_strides), mask=listed, other=float("inf")) * LOG2E
        delta = tl.load(member_pointers(delta_ptr, near, plane, lse_strides), mask=listed, other=0.0)
        # [TILE, BLOCK]
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2E)
        weights = tl.exp2(scores - lse[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
    store_members(grad_key_ptr, grad_key * scale, own, plane, inside, grad_key_strides, DIM, BLOCK_D)
    store_members(grad_value_ptr, grad_value, own, plane, inside, grad_value_strides, DIM, BLOCK_D)
