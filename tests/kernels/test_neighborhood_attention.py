"""The window rule against a loop over positions, any shape against the reference, and what is refused."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionattn_kernels import neighborhood_attention
from visionattn_kernels.ops.neighborhood_attention import reference
from visionattn_kernels.testing import check, neighborhood


def window(position: int, length: int, kernel: int, stride: int, dilation: int) -> list[int]:
    """Keys of a query on one axis, told as NATTEN's documentation tells it, with plain integers."""
    group = list(range(position % dilation, length, dilation))
    centre = min(position // dilation // stride * stride + stride // 2, len(group) - 1)
    start = min(max(centre - kernel // 2, 0), len(group) - kernel)
    return group[start : start + kernel]


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"),
    [((3, 3), (1, 1), (1, 1)), ((4, 3), (1, 1), (1, 2)), ((3, 5), (3, 2), (2, 1)), ((2, 1), (2, 1), (3, 4))],
)
def test_reference_is_the_sum_over_the_window(kernel_size, stride, dilation):
    height, width, dim, scale = 7, 9, 2, 0.7
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, height, width, dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, generator=generator, dtype=torch.float64)
    want = torch.empty_like(q)
    for y in range(height):
        for x in range(width):
            total, weighted = 0.0, torch.zeros(dim, dtype=torch.float64)
            for key_y in window(y, height, kernel_size[0], stride[0], dilation[0]):
                for key_x in window(x, width, kernel_size[1], stride[1], dilation[1]):
                    row = (key_y - y) // dilation[0] + kernel_size[0] - 1
                    column = (key_x - x) // dilation[1] + kernel_size[1] - 1
                    weight = math.exp(scale * q[y, x] @ k[key_y, key_x] + bias[row, column])
                    total, weighted = total + weight, weighted + weight * v[key_y, key_x]
            want[y, x] = weighted / total
    got = reference(*(x[None, None] for x in (q, k, v)), kernel_size, stride, dilation, bias[None], scale)[0, 0]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_agrees_with_the_reference(data):
    kernel_size = tuple(data.draw(st.integers(1, 8), label="kernel") for _ in range(2))
    dilation = tuple(data.draw(st.integers(1, 3), label="dilation") for _ in range(2))
    stride = tuple(data.draw(st.integers(1, kernel), label="stride") for kernel in kernel_size)
    height, width = (
        data.draw(st.integers(kernel * step, kernel * step + 12))
        for kernel, step in zip(kernel_size, dilation, strict=True)
    )
    batch, heads, dim = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 4, 9])),
    )
    case = neighborhood(
        batch, heads, height, width, dim, kernel_size=kernel_size, stride=stride, dilation=dilation, bias=True
    )
    check(case, neighborhood_attention)


def test_many_small_maps_are_computed_in_pieces():
    check(neighborhood(7, 4, 33, 35, 8, kernel_size=3, dilation=(11, 9), bias=True), neighborhood_attention)


@pytest.mark.parametrize(("height", "dilation"), [(9, 1), (29, 1), (29, 2)])
def test_the_forward_returns_the_logarithms_of_the_softmaxs_sums(height, dilation):
    batch, heads, width = 2, 3, 11
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, height, width, 8, generator=generator, dtype=torch.float64)
    _, lse = torch.ops.visionattn.neighborhood_attention(q, k, v, None, [3, 3], [1, 1], [dilation] * 2, 0.5)
    for image, head, y, x in itertools.product(range(batch), range(heads), range(0, height, 4), range(0, width, 3)):
        rows, columns = (window(at, length, 3, 1, dilation) for at, length in ((y, height), (x, width)))
        scores = 0.5 * k[image, head][rows][:, columns] @ q[image, head, y, x]
        torch.testing.assert_close(lse[image, head, y, x], scores.flatten().logsumexp(0), rtol=1e-12, atol=1e-12)


def maps(*shape: int) -> list[torch.Tensor]:
    return [torch.zeros(shape) for _ in range(3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 8, 8, 4)}, "query must be (B, heads, H, W, D), got (2, 8, 8, 4)"),
        (
            {"query": torch.zeros(1, 0, 8, 8, 4)},
            "query must be (B, heads, H, W, D) with at least 1 of each but B, got (1, 0,",
        ),
        (
            {"query": torch.zeros(1, 2, 8, 8, 0)},
            "query must be (B, heads, H, W, D) with at least 1 of each but B, got (1, 2,",
        ),
        ({"key": torch.zeros(1, 3, 8, 8, 4)}, "key must be query's shape = (1, 2, 8, 8, 4), got (1, 3, 8, 8, 4)"),
        ({"value": torch.zeros(1, 2, 8, 8, 5)}, "value must be query's shape = (1, 2, 8, 8, 4), got (1, 2, 8, 8, 5)"),
        ({"key": torch.zeros(1, 2, 8, 8, 4).half()}, "key must be as query, torch.float32 on cpu, got torch.float16"),
        ({"value": torch.zeros(1, 2, 8, 8, 4, device="meta")}, "value must be as query, torch.float32 on cpu, got"),
        ({"bias": torch.zeros(2, 5, 5).double()}, "bias must be as query, torch.float32 on cpu, got torch.float64"),
        ({"bias": torch.zeros(1, 5, 5)}, "bias must be (heads, 2K-1, 2K-1) = (2, 5, 5), got (1, 5, 5)"),
        ({"kernel_size": 9}, "rows: the window must fit into the map, got kernel_size 9 * dilation 1 = 9 > 8"),
        ({"dilation": (1, 3)}, "columns: the window must fit into the map, got kernel_size 3 * dilation 3 = 9 > 8"),
        ({"dilation": 0}, "rows: kernel_size and dilation must be at least 1 and stride"),
        ({"stride": (1, 4)}, "columns: kernel_size and dilation must be at least 1 and stride"),
        ({"kernel_size": (3, 3, 3)}, "expected one number or one per axis (rows, columns), got (3, 3, 3)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted(changes, message):
    arguments = dict(zip(("query", "key", "value"), maps(1, 2, 8, 8, 4), strict=True)) | {"kernel_size": 3}
    with pytest.raises(ValueError, match=re.escape(message)):
        neighborhood_attention(**(arguments | changes))


def test_whole_numbers_are_refused():
    integers = [x.long() for x in maps(1, 2, 8, 8, 4)]
    with pytest.raises(ValueError, match=r"query must be floating point, got torch\.int64"):
        neighborhood_attention(*integers, 3)


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="is_causal"):
        neighborhood_attention(*maps(1, 2, 8, 8, 4), 3, is_causal=True)
