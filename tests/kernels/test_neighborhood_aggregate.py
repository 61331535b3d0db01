"""Neighborhood aggregate sums the windows of neighborhood attention, at any size, and says what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn_kernels import neighborhood_aggregate, neighborhood_attention
from visionattn_kernels.cpu import tiles
from visionattn_kernels.testing import aggregate, check, evaluate, relative_error

EPS = torch.finfo(torch.float32).eps
AXIS = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(0, 20))  # kernel, dilation, room beyond the window


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), heads=st.integers(1, 3), rows=AXIS, columns=AXIS, dim=st.integers(1, 20))
def test_any_sizes_agree_with_the_reference(batch, heads, rows, columns, dim):
    kernel_size, dilation, room = zip(rows, columns, strict=True)
    shape = (kernel * gap + more for kernel, gap, more in zip(kernel_size, dilation, room, strict=True))
    case = aggregate(batch, heads, *shape, dim, kernel_size=kernel_size, dilation=dilation)
    check(case, neighborhood_aggregate)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(5, 1), ((4, 7), (3, 2))])
def test_equal_weights_are_attention_that_cannot_choose(kernel_size, dilation):
    value = torch.randn(2, 3, 19, 23, 8, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(value)
    want = neighborhood_attention(nothing, nothing, value, kernel_size, dilation=dilation)
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    weights = value.new_full((*value.shape[:4], rows * columns), 1 / (rows * columns))
    assert relative_error(neighborhood_aggregate(weights, value, kernel_size, dilation), want) < 4 * EPS


def test_pieces_make_the_same_whole(monkeypatch):
    case = aggregate(3, 2, 13, 18, 8, kernel_size=5, dilation=2)
    want = evaluate(neighborhood_aggregate, case, case.tensors())
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 1)
    got = evaluate(neighborhood_aggregate, case, case.tensors())
    assert all(relative_error(got[name], want[name]) < 4 * EPS for name in want)


@pytest.mark.parametrize(
    ("starts", "runs"),
    [
        ([0, 0, 0, 1, 2], [(0, 3, 0, 0), (3, 2, 1, 1)]),
        ([2, 3, 4], [(0, 3, 2, 1)]),
        ([7], [(0, 1, 7, 0)]),
        ([0, 3, 3], [(0, 2, 0, 3), (2, 1, 3, 0)]),
    ],
)
def test_runs_cover_every_query_once(starts, runs):
    assert tiles._runs(starts) == runs


MAP = torch.zeros(2, 3, 9, 13, 8)
WEIGHTS = torch.zeros(2, 3, 9, 13, 25)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": MAP[0]}, r"value must be \(B, heads, H, W, D\), got \(3, 9, 13, 8\)"),
        ({"weights": WEIGHTS[..., :9]}, r"weights must be \(B, heads, H, W, K²\) = \(2, 3, 9, 13, 25\), got \(2, 3, 9"),
        ({"value": MAP.double()}, "value must be as weights, torch.float32 on cpu, got torch.float64 on cpu"),
        ({"weights": WEIGHTS.int(), "value": MAP.int()}, "weights must be floating point, got torch.int32"),
        ({"kernel_size": (5, 0)}, "columns: kernel_size and dilation must be at least 1.*got kernel_size=0"),
        ({"dilation": 2}, r"rows: the window must fit into the map, got kernel_size 5 \* dilation 2 = 10 > 9"),
        ({"kernel_size": (5, 5, 5)}, r"expected one number or one per axis \(rows, columns\), got \(5, 5, 5\)"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_aggregate(**{"weights": WEIGHTS, "value": MAP, "kernel_size": 5} | changed)
