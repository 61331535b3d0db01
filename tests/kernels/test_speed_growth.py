"""Time of every operator on the CPU grows like the number of pixels, from 32x32 to 256x256."""

import math
import time

import pytest
import torch

from visionattn_kernels import OPS
from visionattn_kernels.benchmark import interleaved
from visionattn_kernels.testing import Case, aggregate, evaluate, flow, halo, linear, neighborhood, routed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIDES = (32, 64, 128, 256)
SLOPE = 1.15

# Regions of routed attention keep their size, 8x8; choosing the routes is not part of the operator.
SIZED = {
    "neighborhood_attention": lambda side: neighborhood(1, 1, side, side, 32, kernel_size=7, bias=True),
    "neighborhood_aggregate": lambda side: aggregate(1, 1, side, side, 16, kernel_size=7),
    "routed_attention": lambda side: routed(1, 1, side * side // 64, 64, 32, topk=4),
    "halo_attention": lambda side: halo(1, 1, side, side, 16, block_size=8, halo_size=3),
    "linear_attention": lambda side: linear(1, 2, side * side, 32, normalization="subtraction"),
    "flow_attention": lambda side: flow(1, 2, side * side, 32),
}


def slope(times: dict[int, float]) -> float:
    """Of the straight line that fits log time over log pixels best."""
    pixels, seconds = (torch.tensor([math.log(x) for x in xs]) for xs in ([s * s for s in times], times.values()))
    pixels, seconds = pixels - pixels.mean(), seconds - seconds.mean()
    return float((pixels * seconds).sum() / (pixels * pixels).sum())


def test_every_operator_is_timed():
    assert set(SIZED) == set(OPS)


@pytest.mark.parametrize("op", SIZED)
def test_time_is_linear_in_the_pixels(op):
    def run(case: Case, tensors: dict):
        return lambda: evaluate(OPS[op].call, case, tensors)

    cases = {side: SIZED[op](side) for side in SIDES}
    times = interleaved({side: run(case, case.tensors()) for side, case in cases.items()}, 3, time.process_time)
    assert slope(times) <= SLOPE, times
