"""Relative position bias on the matrix units: device functions that spread a bias over pairs and sum over pairs.

A bias (2K-1, 2K-1) is indexed by key minus query plus K - 1 along each axis. Reading it entry by entry would take a
64-bit pointer for every pair of a query and a key, and all registers with it; instead, two products with matrices of
zeros and ones select the entries, which is exact, and the same two products, transposed, add up the gradients.

Shapes: TILE, BLOCK and SPAN stand for the products of their two numbers where they are one axis of a tile; SPAN is 2K-1
padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def _bias_entries(ptr, KERNEL: tl.constexpr, SPAN: tl.constexpr):
    """[SPAN rows, SPAN columns] pointers to the entries of a bias at `ptr`, and which of them exist."""
    row = tl.arange(0, SPAN[0])[:, None]
    column = tl.arange(0, SPAN[1])[None, :]
    exists = (row < 2 * KERNEL[0] - 1) & (column < 2 * KERNEL[1] - 1)
    return ptr + row * (2 * KERNEL[1] - 1) + column, exists


@triton.jit
def load_bias(ptr, number, KERNEL: tl.constexpr, SPAN: tl.constexpr):
    """[SPAN rows, SPAN columns] bias `number` of those at `ptr`, zero beyond 2K-1."""
    entries, exists = _bias_entries(ptr + number * (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1), KERNEL, SPAN)
    return tl.load(entries, mask=exists, other=0.0)


@triton.jit
def store_bias(ptr, number, values, KERNEL: tl.constexpr, SPAN: tl.constexpr):
    """Store [SPAN rows, SPAN columns] `values` as bias `number` of those at `ptr`."""
    offset = number.to(tl.int64) * (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1)
    entries, exists = _bias_entries(ptr + offset, KERNEL, SPAN)
    tl.store(entries, values, mask=exists)


@triton.jit
def _axis_selector(query, key, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """[TILE * BLOCK, SPAN] `bias_selectors` of one axis."""
    pair = tl.arange(0, TILE * BLOCK)
    offset = key + pair % BLOCK - query - pair // BLOCK + KERNEL - 1
    return tl.where(offset[:, None] == tl.arange(0, SPAN)[None, :], 1.0, 0.0)


@triton.jit
def bias_selectors(query, key, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Which entry of the bias each pair of a query and a key has, by rows and by columns.

    `query` and `key` are the first members of a rectangle of TILE queries and of one of BLOCK keys; all arguments are
    pairs (rows, columns).

    Returns:
        Two of [TILE * BLOCK, SPAN], one for each axis: one where key minus query plus K - 1 of the pair is the number
        of the column, zero elsewhere.
    """
    by_row = _axis_selector(query[0], key[0], KERNEL[0], TILE[0], BLOCK[0], SPAN[0])
    by_column = _axis_selector(query[1], key[1], KERNEL[1], TILE[1], BLOCK[1], SPAN[1])
    return by_row, by_column


@triton.jit
def spread_bias(bias, selectors, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """[TILE, BLOCK] float32 entry of `bias` [SPAN rows, SPAN columns] that each pair has, zero for none."""
    # [pairs of rows, SPAN columns]
    rows = tl.dot(selectors[0].to(bias.dtype), bias, input_precision="ieee").to(bias.dtype)
    # [pairs of rows, pairs of columns]
    pairs = tl.dot(rows, tl.trans(selectors[1].to(bias.dtype)), input_precision="ieee").to(bias.dtype)
    pairs = tl.permute(tl.reshape(pairs, (TILE[0], BLOCK[0], TILE[1], BLOCK[1])), (0, 2, 1, 3))
    return tl.reshape(pairs, (TILE[0] * TILE[1], BLOCK[0] * BLOCK[1])).to(tl.float32)


@triton.jit
def sum_pairs(values, selectors, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """[SPAN rows, SPAN columns] float32 sums of `values` [TILE, BLOCK] over all pairs that have the entry."""
    pairs = tl.permute(tl.reshape(values, (TILE[0], TILE[1], BLOCK[0], BLOCK[1])), (0, 2, 1, 3))
    # [pairs of rows, pairs of columns]
    pairs = tl.reshape(pairs, (TILE[0] * BLOCK[0], TILE[1] * BLOCK[1]))
    # [pairs of rows, SPAN columns]
    sums = tl.dot(pairs, selectors[1].to(values.dtype), input_precision="ieee").to(values.dtype)
    return tl.dot(tl.trans(selectors[0].to(values.dtype)), sums, input_precision="ieee")
