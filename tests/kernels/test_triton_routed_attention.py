"""What only the kernels of routed attention do."""

import pytest
import triton_worker

from visionattn_kernels.testing import routed

pytestmark = pytest.mark.kernels


def test_a_tile_loads_its_queries_and_the_routed_keys_once(interpreter):
    loaded, stored, _ = interpreter.submit(triton_worker.counts_of, routed(1, 2, 6, 35, 16, topk=5)).result()
    positions = 2 * 6 * 35
    route_numbers = 8 * positions * 5
    assert loaded == 4 * 16 * (positions + 2 * 5 * positions) + route_numbers
    assert stored == 4 * (16 * positions + positions)


def test_heads_of_more_than_128_channels_are_an_error(interpreter):
    message = interpreter.submit(triton_worker.error_of, routed(1, 1, 2, 2, 136, topk=1)).result()
    assert "at most 128 channels a head, got 136" in message
