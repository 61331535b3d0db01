"""Every Triton kernel against its operator's reference, in the interpreter, hence in processes of their own."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import triton_worker

from visionattn_kernels.testing import CASES, neighborhood

pytestmark = pytest.mark.kernels

# What the cases of all operators leave out, because on the CPU it makes no difference.
TARGETED = [
    neighborhood(1, 1, 12, 9, 128, kernel_size=5, bias=True),
    neighborhood(1, 1, 9, 11, 104, kernel_size=(3, 4)),
    neighborhood(1, 2, 9, 17, 64, kernel_size=(9, 2), bias=True),
    neighborhood(1, 1, 18, 10, 32, kernel_size=(6, 5), stride=(6, 4), dilation=(3, 1), bias=True),
    neighborhood(1, 1, 5, 17, 16, kernel_size=(1, 17), bias=True, scale=-0.5),
    neighborhood(1, 1, 19, 1, 16, kernel_size=(2, 1), dilation=(9, 1), bias=True),
]
# Operators with kernels.
INTERPRETED = [case for op in ("neighborhood_attention",) for case in CASES[op]] + TARGETED


@pytest.fixture(scope="module")
def interpreter():
    """Processes whose kernels run in the interpreter: the environment decides that before Triton is imported."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=triton_worker.interpret) as pool:
        yield pool


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.op} {case}") for case in INTERPRETED])
def test_kernels_stay_within_the_error_budget_in_any_order_of_programs(case, interpreter):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for _ in interpreter.map(triton_worker.check_kernels, [case] * len(dtypes), dtypes):
        pass


def test_gradients_arrive_from_a_direction_without_strides(interpreter):
    interpreter.submit(triton_worker.check_expanded_gradient).result()


def test_a_shifted_bias_changes_nothing(interpreter):
    interpreter.submit(triton_worker.check_shifted_bias).result()


def test_an_empty_batch_launches_nothing(interpreter):
    interpreter.submit(triton_worker.check_empty_batch).result()


def test_first_query_inverts_the_window_rule(interpreter):
    interpreter.submit(triton_worker.check_first_query).result()


def test_offsets_within_a_map_do_not_overflow_32_bits(interpreter):
    interpreter.submit(triton_worker.check_large_offsets).result()


def test_every_tile_loads_what_its_windows_reach_once(interpreter):
    interpreter.submit(triton_worker.check_counts).result()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "float32, float16 and bfloat16, got torch.float64"),
        ({"dim": 136}, "at most 128 channels a head, got 136"),
        ({"scale": 0.0}, "scale must not be 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_kernels_cannot_compute_is_an_error(changes, message, interpreter):
    assert message in interpreter.submit(triton_worker.error_of, **changes).result()
