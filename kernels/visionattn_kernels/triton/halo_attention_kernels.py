"""Halo attention in Triton, the kernels: one forward, two backward, nothing larger than the maps in memory.

A program owns a tile of the queries of one block (forward, gradients of the query and of the tables) and loops over the
keys of the block's window, or owns a rectangle of keys (gradients of key and value) and loops over the queries of all
blocks whose windows reach it. Queries of a block and keys of a window are counted through, row by row, so that a tile
is full whatever their number is. Every result has one writer and one order of summation: no atomics.

Relative logits come from the matrix units. A query's products with the rows of a table, one for every relative
position, are put in the order of the window's rows or columns; a product with a matrix of zeros and ones then gives
every pair its own, and the same product, transposed, adds up the gradients.

Shapes: TILE and BLOCK queries or keys; BLOCK_D and BLOCK_E channels of queries and of values, padded; SIDE places of
keys along an axis of a window, padded; SPAN relative positions along an axis, padded.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.rows import load_rows, store_rows
from visionattn_kernels.triton.softmax import LOG2E, softmax_end, softmax_start, softmax_step
from visionattn_kernels.triton.windows import (
    before,
    load_members,
    member_pointers,
    store_members,
    tile_places,
    whole_plane,
)

# Rows of a table at once in its gradient, the fewest that a product sums over.
ENTRIES = tl.constexpr(16)


@triton.jit
def _locate_queries(size, heads, QUERIES: tl.constexpr, TILE: tl.constexpr):
    """What this program owns: a tile of the queries of one block of one head; neighbours own neighbouring tiles.

    Returns:
        plane: Image and head; for `load_members`.
        corner: Row and column of the block among the blocks.
        first: Number of the tile's first query within the block.
    """
    pieces: tl.constexpr = (QUERIES * QUERIES + TILE - 1) // TILE
    columns = tl.cdiv(size[1], QUERIES)
    blocks = columns * tl.cdiv(size[0], QUERIES)
    block = tl.program_id(0) // pieces
    image_head = block // blocks
    corner = (block % blocks // columns, block % columns)
    return whole_plane(image_head // heads, image_head % heads), corner, tl.program_id(0) % pieces * TILE


@triton.jit
def _block_queries(corner, first, size, QUERIES: tl.constexpr, TILE: tl.constexpr):
    """Queries of the block at `corner` from number `first` on.

    Returns:
        Rows and columns within the block, rows and columns of the map, [TILE] each, and [TILE] which of them exist.
    """
    number = first + tl.arange(0, TILE)
    within = (number // QUERIES, number % QUERIES)
    places = (corner[0] * QUERIES + within[0], corner[1] * QUERIES + within[1])
    return within, places, (number < QUERIES * QUERIES) & before(places, size)


@triton.jit
def _window_keys(corner, first, size, SIZE: tl.constexpr, HALO: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of the window of the block at `corner` from number `first` on.

    Returns:
        Rows and columns within the window, rows and columns of the map, [BLOCK] each; [BLOCK] which of them are of the
        window, and which of them are on the map: the others are zero.
    """
    window: tl.constexpr = SIZE + 2 * HALO
    number = first + tl.arange(0, BLOCK)
    within = (number // window, number % window)
    places = (corner[0] * SIZE - HALO + within[0], corner[1] * SIZE - HALO + within[1])
    seen = number < window * window
    return within, places, seen, seen & (places[0] >= 0) & (places[1] >= 0) & before(places, size)


@triton.jit
def _load_chunk(rows, inside, first, stride, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """[BLOCK, CHUNK] channels from number `first` on of the rows at the pointers `rows`; zero where there are none."""
    channel = first + tl.arange(0, CHUNK)[None, :]
    return tl.load(rows[:, None] + channel * stride, mask=inside[:, None] & (channel < DIM), other=0.0)


@triton.jit
def _relative_logits(
    rows,
    inside,
    stride,
    height_ptr,
    width_ptr,
    within,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    SIDE: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Relative logits of the queries at [TILE] pointers `rows`, in base 2 and their dtype.

    Channels come in chunks: a product of 128 float32 channels outside a loop spills registers.

    Returns:
        Two of [TILE, SIDE], for the rows and for the columns of the window.
    """
    entry = tl.arange(0, SPAN)
    exists = entry < 2 * WINDOW - 1
    # [TILE, SPAN]
    by_row = tl.zeros([TILE, SPAN], tl.float32)
    by_column = tl.zeros([TILE, SPAN], tl.float32)
    for first in range(0, DIM, CHUNK):
        # [TILE, CHUNK], [SPAN, CHUNK], [SPAN, CHUNK]
        query = _load_chunk(rows, inside, first, stride, DIM, CHUNK)
        height = _load_chunk(height_ptr + entry * DIM, exists, first, 1, DIM, CHUNK)
        width = _load_chunk(width_ptr + entry * DIM, exists, first, 1, DIM, CHUNK)
        by_row = tl.dot(query, tl.trans(height), by_row, input_precision="ieee")
        by_column = tl.dot(query, tl.trans(width), by_column, input_precision="ieee")
    dtype: tl.constexpr = rows.dtype.element_ty
    by_row = _in_order(by_row, within[0], WINDOW, SPAN, SIDE).to(dtype)
    return by_row, _in_order(by_column, within[1], WINDOW, SPAN, SIDE).to(dtype)


@triton.jit
def _in_order(products, within, WINDOW: tl.constexpr, SPAN: tl.constexpr, SIDE: tl.constexpr):
    """[TILE, SIDE] logits, in base 2, of an axis's places of keys, from [TILE, SPAN] products by relative position."""
    entry = tl.arange(0, SIDE)[None, :] - within[:, None] + WINDOW - 1
    return tl.gather(products, tl.minimum(tl.maximum(entry, 0), SPAN - 1), 1) * LOG2E


@triton.jit
def _selector(places, dtype: tl.constexpr, SIDE: tl.constexpr):
    """[SIDE, BLOCK] ones where a key has the place on an axis that the row counts, zero elsewhere."""
    return tl.where(tl.arange(0, SIDE)[:, None] == places[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def _add_relative(scores, by_row, by_column, place, SIDE: tl.constexpr):
    """[TILE, BLOCK] `scores` plus the relative logits of each pair; both [TILE, SIDE], keys at `place` (2 [BLOCK])."""
    scores = tl.dot(by_row, _selector(place[0], by_row.dtype, SIDE), scores, input_precision="ieee")
    return tl.dot(by_column, _selector(place[1], by_column.dtype, SIDE), scores, input_precision="ieee")


@triton.jit
def _sum_relative(sums, grad_scores, places, SIDE: tl.constexpr):
    """[TILE, SIDE] `sums` plus those of [TILE, BLOCK] `grad_scores` over the keys at each of an axis's places."""
    selector = tl.trans(_selector(places, grad_scores.dtype, SIDE))
    return tl.dot(grad_scores, selector, sums, input_precision="ieee")


@triton.jit
def _differentiate_table(
    grad_logits,
    query,
    grad_query,
    table_ptr,
    sums_ptr,
    within,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the gradient of a table at `sums_ptr`; [TILE, BLOCK_D] `grad_query` plus what the table gives.

    `grad_logits` is [TILE, SIDE], the table at `table_ptr` and its gradient are (2P-1, D), contiguous.
    """
    for first in range(0, SPAN, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        place = entry[None, :] + within[:, None] - WINDOW + 1
        there = (place >= 0) & (place < WINDOW)
        # [TILE, ENTRIES]
        gradients = tl.where(there, tl.gather(grad_logits, tl.where(there, place, 0), 1), 0.0).to(query.dtype)
        exists = entry < 2 * WINDOW - 1
        # [ENTRIES, BLOCK_D]
        sums = tl.dot(tl.trans(gradients), query, input_precision="ieee")
        store_rows(sums_ptr + entry * DIM, sums, exists, 1, DIM, BLOCK_D)
        table = load_rows(table_ptr + entry * DIM, exists, 1, DIM, BLOCK_D)
        grad_query = tl.dot(gradients, table, grad_query, input_precision="ieee")
    return grad_query


@triton.jit
def halo_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    height_ptr,
    width_ptr,
    out_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    query_size,
    key_size,
    heads,
    scale,
    SIZE: tl.constexpr,
    HALO: tl.constexpr,
    QUERIES: tl.constexpr,
    SIDE: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Results and logarithms of the softmax's sums of a tile of queries; online softmax over blocks of keys."""
    window: tl.constexpr = SIZE + 2 * HALO
    plane, corner, start = _locate_queries(query_size, heads, QUERIES, TILE)
    within, own, inside = _block_queries(corner, start, query_size, QUERIES, TILE)
    rows = member_pointers(query_ptr, own, plane, query_strides)
    # [TILE, SIDE], [TILE, SIDE]
    by_row, by_column = _relative_logits(
        rows, inside, query_strides[4], height_ptr, width_ptr, within, window, SPAN, SIDE, DIM, TILE, CHUNK
    )
    # [TILE, BLOCK_D]
    query = load_rows(rows, inside, query_strides[4], DIM, BLOCK_D)
    highest, total, out = softmax_start(TILE, BLOCK_E)
    for first in range(0, window * window, BLOCK):
        place, near, seen, on_map = _window_keys(corner, first, key_size, SIZE, HALO, BLOCK)
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E]
        key = load_members(key_ptr, near, plane, on_map, key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, on_map, value_strides, DIM_E, BLOCK_E)
        # [TILE, BLOCK]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        scores = _add_relative(scores, by_row, by_column, place, SIDE)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest, total, out = softmax_step(scores, value, highest, total, out)
    out, lse = softmax_end(highest, total, out)
    store_members(out_ptr, out, own, plane, inside, out_strides, DIM_E, BLOCK_E)
    tl.store(member_pointers(lse_ptr, own, plane, lse_strides), lse, mask=inside)


@triton.jit
def halo_attention_bwd_query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    height_ptr,
    width_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    logits_ptr,
    grad_query_ptr,
    table_sums_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_strides,
    grad_query_strides,
    logits_strides,
    lse_strides,
    query_size,
    key_size,
    heads,
    scale,
    SIZE: tl.constexpr,
    HALO: tl.constexpr,
    QUERIES: tl.constexpr,
    SIDE: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of a tile of queries and its share of the tables'.

    For the next kernel it stores sum(grad * out) and the relative logits, which are a product less there.
    """
    window: tl.constexpr = SIZE + 2 * HALO
    plane, corner, start = _locate_queries(query_size, heads, QUERIES, TILE)
    within, own, inside = _block_queries(corner, start, query_size, QUERIES, TILE)
    # [TILE, BLOCK_D], [TILE, BLOCK_E]
    query = load_members(query_ptr, own, plane, inside, query_strides, DIM, BLOCK_D)
    grad = load_members(grad_ptr, own, plane, inside, grad_strides, DIM_E, BLOCK_E)
    out = load_members(out_ptr, own, plane, inside, out_strides, DIM_E, BLOCK_E)
    # [TILE]
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(member_pointers(delta_ptr, own, plane, lse_strides), delta, mask=inside)
    # Beyond the map an infinite sum of the softmax makes the weights zero.
    lse = tl.load(member_pointers(lse_ptr, own, plane, lse_strides), mask=inside, other=float("inf")) * LOG2E
    rows = member_pointers(query_ptr, own, plane, query_strides)
    # [TILE, SIDE], [TILE, SIDE]
    by_row, by_column = _relative_logits(
        rows, inside, query_strides[4], height_ptr, width_ptr, within, window, SPAN, SIDE, DIM, TILE, CHUNK
    )
    store_members(logits_ptr, by_row, own, plane, inside, logits_strides, SIDE, SIDE)
    store_members(logits_ptr + SIDE * logits_strides[4], by_column, own, plane, inside, logits_strides, SIDE, SIDE)
    grad_by_row = tl.zeros([TILE, SIDE], tl.float32)
    grad_by_column = tl.zeros([TILE, SIDE], tl.float32)
    grad_query = tl.zeros([TILE, BLOCK_D], tl.float32)
    for first in range(0, window * window, BLOCK):
        place, near, seen, on_map = _window_keys(corner, first, key_size, SIZE, HALO, BLOCK)
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E]
        key = load_members(key_ptr, near, plane, on_map, key_strides, DIM, BLOCK_D)
        value = load_members(value_ptr, near, plane, on_map, value_strides, DIM_E, BLOCK_E)
        # [TILE, BLOCK]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        scores = _add_relative(scores, by_row, by_column, place, SIDE)
        weights = tl.exp2(tl.where(seen[None, :], scores, float("-inf")) - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        grad_by_row = _sum_relative(grad_by_row, grad_scores, place[0], SIDE)
        grad_by_column = _sum_relative(grad_by_column, grad_scores, place[1], SIDE)
    table_size: tl.constexpr = (2 * window - 1) * DIM
    sums_ptr = table_sums_ptr + tl.program_id(0).to(tl.int64) * (2 * table_size)
    grad_query = _differentiate_table(
        grad_by_row, query, grad_query * scale, height_ptr, sums_ptr, within[0], window, SPAN, DIM, BLOCK_D
    )
    grad_query = _differentiate_table(
        grad_by_column, query, grad_query, width_ptr, sums_ptr + table_size, within[1], window, SPAN, DIM, BLOCK_D
    )
    store_members(grad_query_ptr, grad_query, own, plane, inside, grad_query_strides, DIM, BLOCK_D)


@triton.jit
def halo_attention_bwd_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    logits_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    grad_key_strides,
    grad_value_strides,
    logits_strides,
    lse_strides,
    query_size,
    key_size,
    heads,
    scale,
    SIZE: tl.constexpr,
    HALO: tl.constexpr,
    QUERIES: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of a rectangle of keys and of its values, over the queries of the blocks whose windows reach it."""
    window: tl.constexpr = SIZE + 2 * HALO
    pieces: tl.constexpr = (QUERIES * QUERIES + BLOCK - 1) // BLOCK
    tiles = (tl.cdiv(key_size[0], TILE[0]), tl.cdiv(key_size[1], TILE[1]))
    image_head = tl.program_id(0) // (tiles[0] * tiles[1])
    plane = whole_plane(image_head // heads, image_head % heads)
    top, left = tl.program_id(0) // tiles[1] % tiles[0] * TILE[0], tl.program_id(0) % tiles[1] * TILE[1]
    own = tile_places(top, left, TILE)
    inside = before(own, key_size)
    # [TILE, BLOCK_D], [TILE, BLOCK_E]
    key = load_members(key_ptr, own, plane, inside, key_strides, DIM, BLOCK_D)
    value = load_members(value_ptr, own, plane, inside, value_strides, DIM_E, BLOCK_E)
    grad_key = tl.zeros([TILE[0] * TILE[1], BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE[0] * TILE[1], BLOCK_E], tl.float32)
    # Blocks from the first whose window ends behind the rectangle's first key to the last that begins before its end.
    first_y, first_x = tl.maximum(top - HALO, 0) // SIZE, tl.maximum(left - HALO, 0) // SIZE
    end_y = (tl.minimum(top + TILE[0], key_size[0]) - 1 + HALO) // SIZE + 1
    end_x = (tl.minimum(left + TILE[1], key_size[1]) - 1 + HALO) // SIZE + 1
    end_y = tl.minimum(end_y, tl.cdiv(query_size[0], QUERIES))
    end_x = tl.minimum(end_x, tl.cdiv(query_size[1], QUERIES))
    columns = end_x - first_x
    for step in range((end_y - first_y) * columns * pieces):
        block = step // pieces
        corner = (first_y + block // columns, first_x + block % columns)
        _, near, near_inside = _block_queries(corner, step % pieces * BLOCK, query_size, QUERIES, BLOCK)
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E]
        query = load_members(query_ptr, near, plane, near_inside, query_strides, DIM, BLOCK_D)
        grad = load_members(grad_ptr, near, plane, near_inside, grad_strides, DIM_E, BLOCK_E)
        # [BLOCK]; beyond the last query an infinite sum of the softmax makes the weights zero
        lse = tl.load(member_pointers(lse_ptr, near, plane, lse_strides), mask=near_inside, other=float("inf")) * LOG2E
        delta = tl.load(member_pointers(delta_ptr, near, plane, lse_strides), mask=near_inside, other=0.0)
        # [BLOCK, SIDE]
        by_row = load_members(logits_ptr, near, plane, near_inside, logits_strides, SIDE, SIDE)
        column_ptr = logits_ptr + SIDE * logits_strides[4]
        by_column = load_members(column_ptr, near, plane, near_inside, logits_strides, SIDE, SIDE)
        # [TILE] row and column of each key within the block's window, if it is there
        place = (own[0] - corner[0] * SIZE + HALO, own[1] - corner[1] * SIZE + HALO)
        seen = (place[0] >= 0) & (place[1] >= 0) & (place[0] < window) & (place[1] < window)
        # [TILE, BLOCK]
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2E)
        row_selector = tl.trans(_selector(place[0], query.dtype, SIDE))
        scores = tl.dot(row_selector, tl.trans(by_row), scores, input_precision="ieee")
        column_selector = tl.trans(_selector(place[1], query.dtype, SIDE))
        scores = tl.dot(column_selector, tl.trans(by_column), scores, input_precision="ieee")
        weights = tl.exp2(tl.where(seen[:, None], scores, float("-inf")) - lse[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
    store_members(grad_key_ptr, grad_key * scale, own, plane, inside, grad_key_strides, DIM, BLOCK_D)
    store_members(grad_value_ptr, grad_value, own, plane, inside, grad_value_strides, DIM_E, BLOCK_E)
