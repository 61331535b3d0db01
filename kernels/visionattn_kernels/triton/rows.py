"""Device functions that all kernels share: blocks of rows, whose channels may be fewer than the block's."""

import triton
import triton.language as tl


@triton.jit
def _row_mask(inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] or, where every channel of the block exists, [BLOCK, 1]: which channels of which rows exist."""
    mask = inside[:, None]
    if DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return mask


@triton.jit
def load_rows(rows, inside, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] channels of the rows at the pointers `rows`; zero where not `inside` and beyond channel DIM."""
    pointers = rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride
    return tl.load(pointers, mask=_row_mask(inside, DIM, BLOCK_D), other=0.0)


@triton.jit
def store_rows(rows, values, inside, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] `values` at the pointers `rows`, where `inside` and up to channel DIM."""
    pointers = rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride
    tl.store(pointers, values.to(rows.dtype.element_ty), mask=_row_mask(inside, DIM, BLOCK_D))
