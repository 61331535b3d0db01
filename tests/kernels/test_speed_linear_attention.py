"""Linear and flow attention on the CPU are as fast and small as they should be, three tenths off for noise."""

import pytest

from visionattn_kernels.baselines import SHAPES

pytestmark = pytest.mark.speed

NOISE = 0.7
TARGET = 0.97


@pytest.mark.parametrize(
    "case", SHAPES["linear_attention"] + SHAPES["flow_attention"], ids=lambda case: f"{case.op} {case}"
)
def test_as_fast_as_the_families_code_and_smaller(compare_alone, case):
    measured = compare_alone(case)
    assert measured.forward_ratio >= NOISE * TARGET
    assert measured.both_ratio >= NOISE * TARGET
    assert measured.memory <= measured.baseline_memory
