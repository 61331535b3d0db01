"""What only the kernels of halo attention do."""

import pytest
import triton_worker

from visionattn_kernels.testing import halo

pytestmark = pytest.mark.kernels


def test_a_tile_loads_the_keys_of_its_window_that_are_on_the_map_once(interpreter):
    case = halo(1, 2, 9, 13, 16, 24, block_size=4, halo_size=1)
    loaded, stored, _ = interpreter.submit(triton_worker.counts_of, case).result()

    def on_map(length: int) -> int:
        return sum(min(first + 5, length) - max(first - 1, 0) for first in range(0, length, 4))

    positions, blocks = 2 * 9 * 13, 2 * 3 * 4
    keys, tables = 2 * on_map(9) * on_map(13), blocks * 2 * (2 * 6 - 1)
    # Queries once for the tables and once for the keys.
    assert loaded == 4 * (2 * 16 * positions + (16 + 24) * keys + 16 * tables)
    assert stored == 4 * (24 * positions + positions)


@pytest.mark.parametrize("dims", [(136, 8), (8, 136)], ids=["keys", "values"])
def test_heads_of_more_than_128_channels_are_an_error(dims, interpreter):
    case = halo(1, 1, 4, 4, *dims, block_size=4, halo_size=1)
    assert "at most 128 channels a head, got 136" in interpreter.submit(triton_worker.error_of, case).result()
