"""What runs in the processes that interpret kernels; Triton is imported only there."""

import math
import os
import random
from dataclasses import replace

import torch
from torch import Tensor

from visionattn_kernels import OPS, neighborhood_attention
from visionattn_kernels.ops.windows import window_start
from visionattn_kernels.testing import SHARED, Case, error_budget, evaluate, neighborhood, relative_error, widened


def interpret() -> None:
    """Prepare this process: kernels run in the interpreter, and memory that no one has written holds NaN."""
    os.environ["TRITON_INTERPRET"] = "1"
    from visionattn_kernels.triton.evidence.interpret import stand_in

    stand_in()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def shuffled(programs: int) -> list[int]:
    """The same permutation in every call, and not the natural one."""
    order = list(range(programs))
    random.Random(0).shuffle(order)
    return order if programs > 3 else order[::-1]


def guarded(x: Tensor) -> Tensor:
    """The same numbers with NaN around, so that a stray read shows: between the rows of a map, about other tensors."""
    if not x.is_floating_point():
        return x
    axes = x.ndim if x.ndim == 5 else 1
    memory = x.new_full([size + 2 for size in x.shape[:axes]] + list(x.shape[axes:]), float("nan"))
    inner = memory[(slice(1, -1),) * axes]
    inner.copy_(x.detach())
    return inner.requires_grad_(x.requires_grad)


def small(case: Case) -> Case:
    """`case`, of one image where there are more than 1,000 positions: the interpreter takes 50 ms a program."""
    first = next(iter(case.shapes.values()))
    if math.prod(first[:-1]) <= 1000:
        return case
    shapes = {name: shape if name in SHARED else (1, *shape[1:]) for name, shape in case.shapes.items()}
    indices = {name: ((1, *shape[1:]), choices) for name, (shape, choices) in case.indices.items()}
    return replace(case, shapes=shapes, indices=indices)


def check_kernels(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward of the kernels on guarded inputs, in two orders of programs, against the reference.

    Raises:
        AssertionError: The orders differ in a bit, or a result is outside its error budget.
    """
    from visionattn_kernels.triton.evidence.interpret import program_order

    case = small(case)
    operator = OPS[case.op]
    plain = case.tensors(dtype)
    tensors = {name: guarded(x) for name, x in plain.items()}
    with program_order(shuffled):
        got = evaluate(operator.call, case, tensors)
    if dtype == torch.float32:
        natural = evaluate(operator.call, case, tensors)
        for name, x in natural.items():
            assert torch.equal(got[name], x), f"{name} depends on the order of programs"
    want = evaluate(operator.reference, case, widened(plain))
    for name, budget in error_budget(case, plain, want, operator.reference).items():
        error = relative_error(got[name], want[name])
        assert error <= budget, f"{dtype}: error of {name} is {error:.2e}, budget {budget:.2e}"


def check_expanded_gradient() -> None:
    """`out.sum().backward()` gives the kernels a gradient whose strides are all 0."""
    case = neighborhood(1, 1, 9, 10, 16, kernel_size=3, bias=True)
    tensors = case.tensors()
    grads = torch.autograd.grad(neighborhood_attention(**tensors, **case.settings).sum(), list(tensors.values()))
    exact = widened(tensors)
    wanted = torch.autograd.grad(OPS[case.op].reference(**exact, **case.settings).sum(), list(exact.values()))
    for name, got, want in zip(tensors, grads, wanted, strict=True):
        # Weights sum to one, so the gradients of scores cancel: only rounding is left, and its scale is that of value.
        assert (got - want).abs().max() < 1e-5 * wanted[2].abs().max(), name


def check_shifted_bias() -> None:
    """A constant added to the bias changes nothing, though its exponential overflows, within and beyond the map."""
    case = neighborhood(1, 1, 9, 10, 16, kernel_size=3, bias=True)
    tensors = case.tensors()
    shift = 200.0
    shifted = {**tensors, "bias": (tensors["bias"].detach() + shift).requires_grad_()}
    want, got = (evaluate(neighborhood_attention, case, x) for x in (tensors, shifted))
    for name in want:
        # Scores are rounded at the size of the shift, weights therefore by as much, relatively.
        assert relative_error(got[name], want[name]) < 4 * shift * torch.finfo(torch.float32).eps, name


def check_empty_batch() -> None:
    """No images: empty results, and the gradient of the bias is zero."""
    query = torch.zeros(0, 2, 9, 9, 16, requires_grad=True)
    bias = torch.zeros(2, 5, 5, requires_grad=True)
    out = neighborhood_attention(query, query, query, kernel_size=3, bias=bias)
    out.sum().backward()
    assert out.shape == query.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def check_first_query() -> None:
    """`first_query` of the kernels against the window rule of `ops/windows.py`, all starts of many axes."""
    from triton_probes import first_query_kernel

    starts = torch.arange(-24, 40, dtype=torch.int32)
    for size in (1, 2, 3, 4, 7, 10):
        for stride in range(1, size + 1):
            for members in {size, size + 1, 2 * size, 3 * size + 2}:
                got = torch.empty_like(starts)
                first_query_kernel[(1,)](starts, got, members, COUNT=len(starts), KERNEL=size, STRIDE=stride)
                of_places = window_start(torch.arange(members), members, size, stride)
                want = (of_places < starts[:, None]).sum(1, dtype=torch.int32)
                assert torch.equal(got, want), f"K = {size}, stride {stride}, {members} members"


def check_large_offsets() -> None:
    """Offsets of members, and of maps, where 32 bits are not enough; no memory is read."""
    from triton_probes import member_offset_kernel

    got = torch.empty(4, dtype=torch.int64)
    plane, strides = (5, 3, 1, 2, 4, 8), (2**31 + 1, 2**30, 2**29, 2**28, 1)
    member_offset_kernel[(1,)](torch.empty(1), got, plane, strides, COUNT=4)
    index = torch.arange(4)
    maps = 5 * (2**31 + 1) + 3 * 2**30
    assert torch.equal(got, maps + (1 + 4 * index) * 2**29 + (2 + 8 * 2 * index) * 2**28)


def check_counts() -> None:
    """Bytes that the forward loads and stores, counted, against the sum over tiles of what their windows reach."""
    from visionattn_kernels.triton.evidence.interpret import counting

    case = neighborhood(1, 2, 17, 21, 16, kernel_size=(5, 3), dilation=(1, 2))
    tensors = {name: x.detach() for name, x in case.tensors().items()}
    with counting() as counts:
        neighborhood_attention(**tensors, **case.settings)

    def reach(members: int, kernel: int) -> int:
        start = window_start(torch.arange(members), members, kernel, 1).tolist()
        return sum(start[min(first + 8, members) - 1] + kernel - start[first] for first in range(0, members, 8))

    keys = 2 * reach(17, 5) * (reach(11, 3) + reach(10, 3))
    positions = 2 * 17 * 21
    assert counts.loaded == 4 * 16 * (positions + 2 * keys)
    assert counts.stored == 4 * (16 * positions + positions)
    assert counts.flops >= 2 * 2 * 16 * 5 * 3 * positions


def error_of(dtype: torch.dtype = torch.float32, dim: int = 16, scale: float = 1.0) -> str:
    """Message of the ValueError that such a call raises."""
    query = torch.zeros(1, 1, 5, 5, dim, dtype=dtype)
    try:
        neighborhood_attention(query, query, query, kernel_size=3, bias=query.new_zeros(1, 5, 5), scale=scale)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")
