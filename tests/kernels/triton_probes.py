"""Kernels that show what device functions return, for tests; imported only in processes that interpret."""

import triton
import triton.language as tl

from visionattn_kernels.triton.tokens import wide_dot
from visionattn_kernels.triton.windows import first_query, member_pointers


@triton.jit
def first_query_kernel(start_ptr, out_ptr, members, COUNT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """[COUNT] `first_query` of the starts at `start_ptr`."""
    index = tl.arange(0, COUNT)
    tl.store(out_ptr + index, first_query(tl.load(start_ptr + index), members, KERNEL, STRIDE))


@triton.jit
def member_offset_kernel(ptr, out_ptr, plane, strides, COUNT: tl.constexpr):
    """[COUNT] offsets, in float32 elements, of the members (0, 0), (1, 2), (2, 4) and so on."""
    index = tl.arange(0, COUNT)
    pointers = member_pointers(ptr, (index, index * 2), plane, strides)
    tl.store(out_ptr + index, (pointers.to(tl.int64) - ptr.to(tl.int64)) // 4)


@triton.jit
def wide_dot_kernel(a_ptr, b_ptr, out_ptr, like_ptr, LENGTH: tl.constexpr):
    """[LENGTH, LENGTH] product of two such matrices of float32, both wide, in the dtype of `like_ptr`."""
    index = tl.arange(0, LENGTH)[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    product = wide_dot(tl.load(a_ptr + index), tl.load(b_ptr + index), like_ptr.dtype.element_ty, True, True)
    tl.store(out_ptr + index, product)
