"""What runs in the processes that interpret kernels; Triton is imported only there."""

import math
import os
import random
from dataclasses import replace

import torch
from torch import Tensor

from visionattn_kernels import OPS
from visionattn_kernels.testing import BUDGET_FACTOR, SHARED, Case, error_budget, evaluate, relative_error, widened


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
    """The same numbers with NaN around, so that a stray read shows: between rows of an image, about what is shared."""
    if not x.is_floating_point():
        return x
    axes = x.ndim if x.ndim >= 4 else 1
    memory = x.new_full([size + 2 for size in x.shape[:axes]] + list(x.shape[axes:]), float("nan"))
    inner = memory[(slice(1, -1),) * axes]
    inner.copy_(x.detach())
    return inner.requires_grad_(x.requires_grad)


# The longest third axis and the most positions that the interpreter, which takes 50 ms and more a program, is asked to
# run: enough to meet every edge that a program has. Of regions so few, routes name one more than once.
LONGEST = {"linear_attention": 600, "flow_attention": 600, "neighborhood_aggregate": 17, "routed_attention": 3}
POSITIONS = {"neighborhood_aggregate": 350, "halo_attention": 150}

# Arguments whose first axis is that of the heads.
BY_HEAD = frozenset({"bias", "scale"})


def small(case: Case) -> Case:
    """`case`, no longer than `LONGEST` says; with too many positions still, of one image, and then of one head."""
    first = next(iter(case.shapes.values()))
    images, heads, length, *rest = first[:-1]
    longest = min(length, LONGEST.get(case.op, length))
    area, most = longest * math.prod(rest), POSITIONS.get(case.op, 1000)
    images = 1 if images * heads * area > most else images
    heads = 1 if heads * area > most else heads

    def cut(shape: tuple[int, ...], *lead: int) -> tuple[int, ...]:
        middle = (longest if n == length else n for n in shape[len(lead) : -1])
        return (*lead, *middle, *shape[len(lead) :][-1:])

    def lead(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name in BY_HEAD:
            return (heads,)
        return shape[:1] if name in SHARED else (images, heads)

    shapes = {name: cut(shape, *lead(name, shape)) for name, shape in case.shapes.items()}
    indices = {
        name: (cut(shape, images), longest if choices == length else choices)
        for name, (shape, choices) in case.indices.items()
    }
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


def check_expanded_gradient(case: Case) -> None:
    """`out.sum().backward()` gives the kernels a gradient whose strides are all 0."""
    case = small(case)
    operator, tensors = OPS[case.op], case.tensors()
    trainable = [name for name, x in tensors.items() if x.requires_grad]
    exact, plain, got = (
        torch.autograd.grad(call(**x, **case.settings).sum(), [x[name] for name in trainable])
        for call, x in (
            (operator.reference, widened(tensors)),
            (operator.reference, tensors),
            (operator.call, {name: guarded(x) for name, x in tensors.items()}),
        )
    )
    for name, *results in zip(trainable, exact, plain, got, strict=True):
        want, reference, result = results
        budget = BUDGET_FACTOR * max(torch.finfo(torch.float32).eps, relative_error(reference, want))
        error = relative_error(result, want)
        assert error <= budget, f"error of the gradient of {name} is {error:.2e}, budget {budget:.2e}"


def check_empty_batch(case: Case) -> None:
    """No images: empty results, and the gradients of what all images share are zero."""
    tensors = case.tensors()
    shared = {name: x for name, x in tensors.items() if name in SHARED}
    images = {name: x[:0].detach().requires_grad_(x.requires_grad) for name, x in tensors.items() if name not in SHARED}
    out = OPS[case.op].call(**images, **shared, **case.settings)
    assert out.numel() == 0
    out.sum().backward()
    for name, x in {**images, **shared}.items():
        if x.requires_grad:
            assert torch.equal(x.grad, torch.zeros_like(x)), name


def counts_of(case: Case) -> tuple[int, int, int]:
    """Bytes loaded, bytes stored and flops of the forward on `case` in float32."""
    from visionattn_kernels.triton.evidence.interpret import counting

    tensors = {name: x.detach() for name, x in case.tensors().items()}
    with counting() as counts:
        OPS[case.op].call(**tensors, **case.settings)
    return counts.loaded, counts.stored, counts.flops


def error_of(case: Case, dtype: torch.dtype = torch.float32) -> str:
    """Message of the ValueError that `case` raises."""
    try:
        OPS[case.op].call(**case.tensors(dtype), **case.settings)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")
