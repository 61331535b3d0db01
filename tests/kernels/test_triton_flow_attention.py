"""What only the kernels of flow attention do; the functions `check_...` run in processes that interpret."""

import pytest
import torch
import triton_worker

from visionattn_kernels import OPS
from visionattn_kernels.testing import BUDGET_FACTOR, evaluate, flow, relative_error, widened

pytestmark = pytest.mark.kernels

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def test_every_token_is_loaded_once_a_pass(interpreter):
    loaded, stored, _ = interpreter.submit(triton_worker.counts_of, flow(1, 2, 600, 16)).result()
    tokens, pieces, blocks = 2 * 600 * 16, 2 * 2, 2 * 10
    vectors, moments = 2 * 16, 16 * 16
    # Two passes over queries and keys, one over keys and values, one over queries; beside them the four sums, with all
    # pieces of each, and the moments.
    passes = 2 * tokens + (2 * tokens + pieces * vectors) + (2 * tokens + pieces * 16) + tokens
    partitions = 2
    sums = 2 * pieces * vectors + pieces * (moments + 1) + partitions + blocks * (vectors + moments)
    assert loaded == 4 * (passes + sums)
    assert stored == 4 * (2 * (pieces + 2) * vectors + (pieces + 2) * (moments + 1) + tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_over_tokens_are_those_of_the_cpu(dtype, interpreter):
    interpreter.submit(check_sums, dtype).result()


def check_sums(dtype: torch.dtype) -> None:
    """Moments, sums of features and partition are as near to the exact ones as those that the CPU computes.

    In 16 bits they are float32 too: a product of two numbers of `dtype` each is off by eps² at most.
    """
    from visionattn_kernels.cpu import flow_attention as cpu
    from visionattn_kernels.triton import flow_attention as gpu

    tensors = [x.detach() for x in flow(2, 1, 600, 16, 24).tensors(dtype).values()]
    unit = torch.finfo(dtype).eps ** (1 if dtype == torch.float32 else 2)
    results = (
        cpu.forward(*(x.double() for x in tensors), 1e-6),
        cpu.forward(*tensors, 1e-6),
        gpu.forward(*tensors, 1e-6),
    )
    for want, plain, got in list(zip(*results, strict=True))[1:]:
        assert (got.shape, got.stride(), got.dtype) == (plain.shape, plain.stride(), torch.float32)
        assert relative_error(got, want) <= BUDGET_FACTOR * max(unit, relative_error(plain, want))


@HALF
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_results_in_half_precision_are_off_by_their_rounding_alone(size, dtype, interpreter):
    interpreter.submit(check_rounding, size, dtype).result()


def check_rounding(size: float, dtype: torch.dtype) -> None:
    """Results are off by a unit of rounding at most, also where queries and keys of size 1,000 saturate the sigmoid.

    One unit is what truncating costs, which the interpreter does; products of rounded numbers would add their own.
    """
    case = flow(1, 1, 80, 16)
    operator, tensors = OPS[case.op], case.tensors(dtype)
    for name in ("query", "key"):
        tensors[name] = (tensors[name].detach() * size).requires_grad_()
    want = evaluate(operator.reference, case, widened(tensors))
    got = evaluate(operator.call, case, tensors)
    for name, exact in want.items():
        error = relative_error(got[name], exact)
        assert error <= torch.finfo(dtype).eps, f"error of {name} is {error:.2e}"


@pytest.mark.parametrize("dims", [(136, 8), (8, 136)], ids=["keys", "values"])
def test_heads_of_more_than_128_channels_are_an_error(dims, interpreter):
    message = interpreter.submit(triton_worker.error_of, flow(1, 1, 4, *dims)).result()
    assert "at most 128 channels a head, got 136" in message
