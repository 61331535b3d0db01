"""What only the kernels of neighborhood aggregate do."""

import pytest
import torch
import triton_worker

from visionattn_kernels.ops.windows import window_start
from visionattn_kernels.testing import aggregate

pytestmark = pytest.mark.kernels


def test_every_weight_is_loaded_once_and_values_as_often_as_tiles_reach_them(interpreter):
    case = aggregate(1, 2, 17, 21, 16, kernel_size=(5, 3), dilation=(1, 2))
    loaded, stored, _ = interpreter.submit(triton_worker.counts_of, case).result()

    def reach(members: int, kernel: int) -> int:
        start = window_start(torch.arange(members), members, kernel, 1).tolist()
        return sum(start[min(first + 8, members) - 1] + kernel - start[first] for first in range(0, members, 8))

    keys, positions = 2 * reach(17, 5) * (reach(11, 3) + reach(10, 3)), 2 * 17 * 21
    assert loaded == 4 * (5 * 3 * positions + 16 * keys)
    assert stored == 4 * 16 * positions


def test_heads_of_more_than_128_channels_are_an_error(interpreter):
    message = interpreter.submit(triton_worker.error_of, aggregate(1, 1, 5, 5, 136, kernel_size=3)).result()
    assert "at most 128 channels a head, got 136" in message
