"""Every Triton kernel against its operator's reference, in the interpreter, hence in processes of their own."""

import pytest
import torch
import triton_worker
from triton_cases import INTERPRETED, TARGETED

from visionattn_kernels.testing import CASES
from visionattn_kernels.triton.evidence import OPERATORS

pytestmark = pytest.mark.kernels

# Every case runs in float32 and in one of these, in turn.
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "half"),
    [pytest.param(case, HALVES[n % 2], id=f"{case.op} {case}") for n, case in enumerate(INTERPRETED)],
)
def test_kernels_stay_within_the_error_budget_in_any_order_of_programs(case, half, interpreter):
    for _ in interpreter.map(triton_worker.check_kernels, [case] * 2, (torch.float32, half)):
        pass


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_arrive_from_a_direction_without_strides(operator, interpreter):
    interpreter.submit(triton_worker.check_expanded_gradient, CASES[operator][-1]).result()


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch_launches_nothing(operator, interpreter):
    interpreter.submit(triton_worker.check_empty_batch, CASES[operator][1]).result()


@pytest.mark.parametrize("operator", OPERATORS)
def test_float64_is_an_error_on_a_gpu(operator, interpreter):
    message = interpreter.submit(triton_worker.error_of, CASES[operator][-1], torch.float64).result()
    assert "float32, float16 and bfloat16, got torch.float64" in message


def test_every_operator_with_kernels_has_cases_for_them_alone():
    assert set(TARGETED) == set(OPERATORS)
