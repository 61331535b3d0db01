"""What only the kernels of linear attention do; the functions `check_...` run in processes that interpret."""

import pytest
import torch
import triton_worker

from visionattn_kernels import OPS
from visionattn_kernels.testing import error_budget, evaluate, linear, relative_error, widened

pytestmark = pytest.mark.kernels

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def test_every_token_is_loaded_once_a_pass(interpreter):
    case = linear(1, 2, 600, 16, normalization="division", feature_map="relu")
    loaded, stored, _ = interpreter.submit(triton_worker.counts_of, case).result()
    means = 16 * 16 + 16 + 16
    pieces, blocks = 2 * 2, 2 * 10
    scales = blocks
    assert loaded == 4 * (2 * 600 * (16 + 16) + pieces * means + 2 * 600 * 16 + blocks * means + scales)
    assert stored == 4 * (pieces * means + 2 * means + 2 * 600 * 16)


@HALF
@pytest.mark.parametrize(
    ("normalization", "feature_map"), [("division", "relu"), ("subtraction", "identity"), ("magnitude", "elu_plus_one")]
)
def test_long_queries_stay_within_the_error_budget_in_half_precision(normalization, feature_map, dtype, interpreter):
    interpreter.submit(check_long_queries, normalization, feature_map, dtype).result()


def check_long_queries(normalization: str, feature_map: str, dtype: torch.dtype) -> None:
    """Queries and keys of size 1,000, whose products float16 cannot hold, stay within the error budget."""
    case = linear(1, 1, 80, 16, normalization=normalization, feature_map=feature_map)
    operator, tensors = OPS[case.op], case.tensors(dtype)
    for name in ("query", "key"):
        tensors[name] = (tensors[name].detach() * 1000).requires_grad_()
    want = evaluate(operator.reference, case, widened(tensors))
    got = evaluate(operator.call, case, tensors)
    for name, budget in error_budget(case, tensors, want, operator.reference).items():
        error = relative_error(got[name], want[name])
        assert error <= budget, f"error of {name} is {error:.2e}, budget {budget:.2e}"


@HALF
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_wide_product_keeps_the_digits_of_two_numbers(size, dtype, interpreter):
    interpreter.submit(check_wide_product, size, dtype).result()


def check_wide_product(size: float, dtype: torch.dtype) -> None:
    """Each wide number is off by eps², and so is the product of the rests, which is left out."""
    from triton_probes import wide_dot_kernel

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator) for _ in range(2))
    got, likes = torch.empty(32, 32), torch.empty(1, dtype=dtype)
    wide_dot_kernel[(1,)](a, b * size, got, likes, LENGTH=32)
    assert relative_error(got, a.double() @ b.double() * size) <= 4 * torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("dims", [(136, 8), (8, 136)], ids=["keys", "values"])
def test_heads_of_more_than_128_channels_are_an_error(dims, interpreter):
    case = linear(1, 1, 4, *dims, normalization="subtraction")
    assert "at most 128 channels a head, got 136" in interpreter.submit(triton_worker.error_of, case).result()
