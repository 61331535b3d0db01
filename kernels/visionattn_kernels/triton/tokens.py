"""Device functions that the linear operators share: tokens of a head, products of wide numbers, sums over pieces.

A sum over all tokens of a head is cut into pieces of consecutive tokens. A program sums one piece, in order, and
`sum_pieces_kernel` adds the pieces up, in order too: every sum is the same in every run.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tokens(heads, pieces):
    """What this program owns: one piece of the tokens of one head.

    Returns:
        plane: Image and head, both of 64 bits.
        piece: Number of the piece.
    """
    plane = tl.program_id(0) // pieces
    return ((plane // heads).to(tl.int64), (plane % heads).to(tl.int64)), tl.program_id(0) % pieces


@triton.jit
def locate_block(heads, tokens, pieces, BLOCK: tl.constexpr):
    """What this program owns of one head: its image and head, its number, [BLOCK] places and whether they exist."""
    plane, block = locate_tokens(heads, pieces)
    places = block * BLOCK + tl.arange(0, BLOCK)
    return plane, plane[0] * heads + plane[1], places, places < tokens


@triton.jit
def _entries(ptr, places, plane, inside, strides, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to BLOCK channels from `first` on of tokens of a head, and which of them exist.

    `first` is a multiple of BLOCK, so that without a rest every channel exists.
    """
    rows = ptr + plane[0] * strides[0] + plane[1] * strides[1] + places.to(tl.int64) * strides[2]
    channel = first + tl.arange(0, BLOCK)
    exists = inside[:, None]
    if DIM % BLOCK:
        exists = exists & (channel < DIM)[None, :]
    return rows[:, None] + channel[None, :] * strides[3], exists


@triton.jit
def load_tokens(ptr, places, plane, inside, strides, DIM: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """[tokens, BLOCK] channels from `first` on in float32; zero where not `inside` and beyond channel DIM."""
    pointers, exists = _entries(ptr, places, plane, inside, strides, first, DIM, BLOCK)
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(ptr, values, places, plane, inside, strides, DIM: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Store [tokens, BLOCK] `values` as channels from `first` on, where `inside` and up to channel DIM."""
    pointers, exists = _entries(ptr, places, plane, inside, strides, first, DIM, BLOCK)
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_vector(ptr, number, DIM: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """[BLOCK] entries from `first` on of vector `number` of those at `ptr`, contiguous; zero beyond DIM."""
    channel = first + tl.arange(0, BLOCK)
    return tl.load(ptr + number * DIM + channel, mask=channel < DIM, other=0.0)


@triton.jit
def store_vector(ptr, number, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store [BLOCK] `values` as vector `number` of those at `ptr`, up to DIM."""
    channel = tl.arange(0, BLOCK)
    tl.store(ptr + number * DIM + channel, values, mask=channel < DIM)


@triton.jit
def _cells(ptr, number, first, DIMS: tl.constexpr, BLOCKS: tl.constexpr):
    """Pointers to the BLOCKS[1] columns from `first` on of matrix `number`, and which cells exist."""
    row, column = tl.arange(0, BLOCKS[0])[:, None], first + tl.arange(0, BLOCKS[1])[None, :]
    return ptr + number * (DIMS[0] * DIMS[1]) + row * DIMS[1] + column, (row < DIMS[0]) & (column < DIMS[1])


@triton.jit
def load_matrix(ptr, number, DIMS: tl.constexpr, BLOCKS: tl.constexpr, first=0):
    """BLOCKS cells, of columns from `first` on, of matrix `number` of those of DIMS at `ptr`; zero beyond."""
    pointers, exists = _cells(ptr, number, first, DIMS, BLOCKS)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def store_matrix(ptr, number, values, DIMS: tl.constexpr, BLOCKS: tl.constexpr):
    """Store `values`, of the size of BLOCKS, as matrix `number` of those of DIMS at `ptr`."""
    pointers, exists = _cells(ptr, number, 0, DIMS, BLOCKS)
    tl.store(pointers, values, mask=exists)


@triton.jit
def _parts(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Split x into two numbers of `dtype`, the rounded one and the rest, and what both were divided by.

    That is 1 but for wide x in float16, which would not hold numbers of every size: there it is x's largest magnitude.
    """
    size = 1.0
    if WIDE and dtype == tl.float16:
        size = tl.max(tl.abs(x))
        size = tl.where(size > 0, size, 1.0)
        x = x / size
    rounded = x.to(dtype)
    return rounded, (x - rounded.to(tl.float32)).to(dtype), size


@triton.jit
def wide_dot(a, b, dtype: tl.constexpr, WIDE_A: tl.constexpr, WIDE_B: tl.constexpr):
    """The product of two float32 matrices on the matrix units of `dtype`.

    What is wide, of any size and not just a number of `dtype` in 32 bits, is multiplied as two such numbers, the
    rounded one and the rest: differences of products, which the normalisations take, would else keep only what 16 bits
    have.
    """
    if dtype == tl.float32:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        a, rest_a, size_a = _parts(a, dtype, WIDE_A)
        b, rest_b, size_b = _parts(b, dtype, WIDE_B)
        product = tl.dot(a, b)
        if WIDE_A:
            product = tl.dot(rest_a, b, product)
        if WIDE_B:
            product = tl.dot(a, rest_b, product)
        if (WIDE_A or WIDE_B) and dtype == tl.float16:
            product = product * (size_a * size_b)
    return product


@triton.jit
def sum_pieces_kernel(pieces_ptr, divisor_ptr, out_ptr, out_stride, length, pieces, factor, BLOCK: tl.constexpr):
    """Sums over the middle axis of (planes, pieces, length), contiguous, in order, times `factor`.

    Where `divisor_ptr` is not None, the sums of a plane are divided by its number there.
    """
    blocks = tl.cdiv(length, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(pieces):
        total += tl.load(pieces_ptr + (plane * pieces + piece) * length + index, mask=index < length, other=0.0)
    total = total * factor
    if divisor_ptr is not None:
        total = total / tl.load(divisor_ptr + plane)
    tl.store(out_ptr + plane * out_stride + index, total, mask=index < length)
