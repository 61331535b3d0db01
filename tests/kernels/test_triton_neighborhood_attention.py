"""What only the kernels of neighborhood attention do; the functions `check_...` run in processes that interpret."""

import pytest
import torch
import triton_worker

from visionattn_kernels import neighborhood_attention
from visionattn_kernels.ops.windows import window_start
from visionattn_kernels.testing import evaluate, neighborhood, relative_error

pytestmark = pytest.mark.kernels


def test_a_shifted_bias_changes_nothing(interpreter):
    interpreter.submit(check_shifted_bias).result()


def check_shifted_bias() -> None:
    """A constant added to the bias changes nothing, though its exponential overflows, within and beyond the map."""
    case = neighborhood(1, 1, 9, 10, 16, kernel_size=3, bias=True)
    tensors = case.tensors()
    shift = 200.0
    shifted = {**tensors, "bias": (tensors["bias"].detach() + shift).requires_grad_()}
    want, got = (evaluate(neighborhood_attention, case, x) for x in (tensors, shifted))
    for name in want:
        # Scores are rounded at the size of the shift, weights therefore by as much, relatively.
        assert relative_error(got[name], want[name]) < 4 * shift * torch.finfo(torch.float32).eps, name


def test_first_query_inverts_the_window_rule(interpreter):
    interpreter.submit(check_first_query).result()


def check_first_query() -> None:
    """`first_query` of the kernels against the window rule of `ops/windows.py`, all starts of many axes."""
    from triton_probes import first_query_kernel

    starts = torch.arange(-24, 40, dtype=torch.int32)
    for size in (1, 2, 3, 4, 7, 10):
        for stride in range(1, size + 1):
            for members in {size, size + 1, 2 * size, 3 * size + 2}:
                got = torch.empty_like(starts)
                first_query_kernel[(1,)](starts, got, members, COUNT=len(starts), KERNEL=size, STRIDE=stride)
                of_places = window_start(torch.arange(members), members, size, stride)
                want = (of_places < starts[:, None]).sum(1, dtype=torch.int32)
                assert torch.equal(got, want), f"K = {size}, stride {stride}, {members} members"


def test_offsets_within_a_map_do_not_overflow_32_bits(interpreter):
    interpreter.submit(check_large_offsets).result()


def check_large_offsets() -> None:
    """Offsets of members, and of maps, where 32 bits are not enough; no memory is read."""
    from triton_probes import member_offset_kernel

    got = torch.empty(4, dtype=torch.int64)
    plane, strides = (5, 3, 1, 2, 4, 8), (2**31 + 1, 2**30, 2**29, 2**28, 1)
    member_offset_kernel[(1,)](torch.empty(1), got, plane, strides, COUNT=4)
    index = torch.arange(4)
    maps = 5 * (2**31 + 1) + 3 * 2**30
    assert torch.equal(got, maps + (1 + 4 * index) * 2**29 + (2 + 8 * 2 * index) * 2**28)


def test_every_tile_loads_what_its_windows_reach_once(interpreter):
    case = neighborhood(1, 2, 17, 21, 16, kernel_size=(5, 3), dilation=(1, 2))
    loaded, stored, flops = interpreter.submit(triton_worker.counts_of, case).result()

    def reach(members: int, kernel: int) -> int:
        start = window_start(torch.arange(members), members, kernel, 1).tolist()
        return sum(start[min(first + 8, members) - 1] + kernel - start[first] for first in range(0, members, 8))

    keys = 2 * reach(17, 5) * (reach(11, 3) + reach(10, 3))
    positions = 2 * 17 * 21
    assert loaded == 4 * 16 * (positions + 2 * keys)
    assert stored == 4 * (16 * positions + positions)
    assert flops >= 2 * 2 * 16 * 5 * 3 * positions


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (neighborhood(1, 1, 5, 5, 136, kernel_size=3), "at most 128 channels a head, got 136"),
        (neighborhood(1, 1, 5, 5, 16, kernel_size=3, bias=True, scale=0.0), "scale must not be 0"),
    ],
    ids=["dim", "scale"],
)
def test_what_the_kernels_cannot_compute_is_an_error(case, message, interpreter):
    assert message in interpreter.submit(triton_worker.error_of, case).result()
