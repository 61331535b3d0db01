"""Time of every operator on the CPU grows like the number of pixels, from 32x32 to 256x256."""

import pytest

from visionattn_kernels import OPS
from visionattn_kernels.benchmark import SIZED, grow, growing_operator, slope

pytestmark = [pytest.mark.speed, pytest.mark.usefixtures("one_thread")]

SIDES = (32, 64, 128, 256)
SLOPE = 1.15


def test_every_operator_is_timed():
    assert set(SIZED) == set(OPS)


@pytest.mark.parametrize("op", SIZED)
def test_time_is_linear_in_the_pixels(op):
    growth = grow(op, growing_operator(op), SIDES)
    assert slope(growth.seconds) <= SLOPE, growth
