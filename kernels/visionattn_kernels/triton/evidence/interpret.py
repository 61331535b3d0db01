"""Triton's interpreter as a stand-in for a GPU: every operator runs its kernels on CPU tensors.

The interpreter is chosen when a kernel is decorated, so a process either interprets or compiles. This module belongs to
a process that has set TRITON_INTERPRET=1 before anything imported Triton. The interpreter computes what a program
computes; it knows nothing of registers, shared memory, matrix instructions or threads, which `inspect.py` and a GPU do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from visionattn_kernels.op import NAMESPACE

_STAND_INS = torch.library.Library(NAMESPACE, "IMPL")
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass
class Counts:
    """What programs did.

    Attributes:
        loaded: Bytes read by `tl.load`, masked elements left out.
        stored: Bytes written by `tl.store`, likewise.
        flops: Two for every multiplication of a `tl.dot`, its padding included.
    """

    loaded: int = 0
    stored: int = 0
    flops: int = 0


def stand_in() -> None:
    """Let every operator's kernels serve its CPU tensors, for the rest of the process.

    Raises:
        RuntimeError: Triton does not interpret in this process.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter needs TRITON_INTERPRET=1 in the environment before Triton is imported")
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        if name.startswith(f"{NAMESPACE}::"):
            op = getattr(getattr(torch.ops, NAMESPACE), name.split("::")[1]).default
            _STAND_INS.impl(op, partial(op.redispatch, _CUDA), "CPU", allow_override=True)


def _dot(plain: Callable) -> Callable:
    """`tl.dot` that knows bfloat16: the interpreter keeps it as 16-bit integers and would multiply those."""

    def dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return plain(builder, a, b, accumulator, input_precision, max_num_imprecise_acc)
        product = np.matmul(_as_float32(a), _as_float32(b))
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    return dot


def _as_float32(handle: TensorHandle) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def program_order(order: Callable[[int], list[int]]) -> Iterator[None]:
    """Run the programs of every launch inside in another order; a GPU promises none.

    Args:
        order: From the number of programs to a permutation of their numbers.
    """
    plain = InterpreterBuilder.set_grid_idx

    def permuted(builder, x, y, z):
        plain(builder, order(builder.grid_dim[0])[x], y, z)

    with patch.object(InterpreterBuilder, "set_grid_idx", permuted):
        yield


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the programs of every launch inside load, store and multiply."""
    counts = Counts()
    load, store, dot = (
        getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "create_dot")
    )

    def counted_load(builder, pointers, mask, *others):
        counts.loaded += _size(pointers, mask)
        return load(builder, pointers, mask, *others)

    def counted_store(builder, pointers, value, mask, *others):
        counts.stored += _size(pointers, mask)
        return store(builder, pointers, value, mask, *others)

    def counted_dot(builder, a, b, *others):
        counts.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(builder, a, b, *others)

    with patch.multiple(
        InterpreterBuilder,
        create_masked_load=counted_load,
        create_masked_store=counted_store,
        create_dot=counted_dot,
    ):
        yield counts


def _size(pointers: TensorHandle, mask: TensorHandle) -> int:
    """Bytes behind the pointers that `mask` leaves."""
    return int(np.count_nonzero(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8
