"""Neighborhood attention on the CPU is as fast and as small as it should be, with three tenths to spare for noise."""

import pytest

from visionattn_kernels.testing import neighborhood

pytestmark = pytest.mark.speed

NOISE = 0.7

# Times as fast as the gather, forward and forward with backward; None where nothing is promised.
TARGETS = [
    (neighborhood(4, 2, 56, 56, 32, kernel_size=7), 8, None),
    (neighborhood(4, 4, 28, 28, 32, kernel_size=7), 8, None),
    (neighborhood(4, 2, 56, 56, 32, kernel_size=7, dilation=8), 15, None),
    (neighborhood(4, 2, 56, 56, 32, kernel_size=7, bias=True), 6, 6),
    (neighborhood(4, 4, 28, 28, 32, kernel_size=7, bias=True), 6, 6),
    (neighborhood(4, 8, 14, 14, 32, kernel_size=7, bias=True), 4, 4),
    (neighborhood(1, 2, 128, 160, 32, kernel_size=7, bias=True), 4, 4),
]


@pytest.mark.parametrize(("case", "forward", "both"), TARGETS, ids=lambda value: str(value))
def test_faster_than_the_gather(compare_alone, case, forward, both):
    measured = compare_alone(case)
    assert measured.forward_ratio >= NOISE * forward
    assert both is None or measured.both_ratio >= NOISE * both


def test_memory_is_at_most_a_fifth_of_the_gathers(compare_alone):
    measured = compare_alone(neighborhood(1, 2, 128, 160, 32, kernel_size=7, bias=True), rounds=1)
    assert measured.memory <= measured.baseline_memory / 5
