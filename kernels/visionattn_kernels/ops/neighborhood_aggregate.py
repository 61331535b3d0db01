"""Neighborhood aggregate: the weighted sum over the window around every position, with weights that are given.

    out[i] = sum_j weights[i, j] v[j],    j in window(i)

This is neighborhood attention without its first half: whoever calls it makes the weights, such as OverLoCK's dynamic
kernels (arXiv:2502.20087), which are no function of a query and a key. NATTEN called it `na2d_av`. Windows are those of
neighborhood attention (`windows.py`): centred, dilated, and shifted inwards at the border.

Shapes: B batch, H and W the map, D channels a head, K window.
    weights: (B, heads, H, W, K²), keys of a window row by row      value, out: (B, heads, H, W, D)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn_kernels.cpu import neighborhood_aggregate as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_kind, check_rank, check_shape
from visionattn_kernels.ops.windows import check_windows, join_blocks, pair, take_blocks, window_blocks, window_offsets


def reference(
    weights: Tensor, value: Tensor, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> Tensor:
    """The definition: K² copies of the values. Arguments as of `neighborhood_aggregate`."""
    rows, columns = (
        (window_offsets(length, kernel, 1, gap) >= 0).nonzero()[:, 1].view(length, kernel).to(value.device)
        for length, kernel, gap in zip(value.shape[2:4], pair(kernel_size), pair(dilation), strict=True)
    )
    # (B, heads, H, K, W, K, D) as (B, heads, H, W, K², D)
    neighbors = value[:, :, rows][:, :, :, :, columns].transpose(3, 4).flatten(4, 5)
    return (weights.unsqueeze(-1) * neighbors).sum(4)


def decomposition(
    weights: Tensor, value: Tensor, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> Tensor:
    """The operator in plain aten, for exported programs: blocks of queries, their weights spread over their keys."""
    size = pair(kernel_size)
    rows, columns = (
        window_blocks(length, kernel, 1, gap, device=value.device)
        for length, kernel, gap in zip(value.shape[2:4], size, pair(dilation), strict=True)
    )
    row, column = (_window_entries(*axis) for axis in zip((rows.offsets, columns.offsets), size, strict=True))
    row, column = row[:, None, :, None, :, None], column[None, :, None, :, None, :]
    # Keys outside the window take the entry that is appended, zero.
    entries = torch.where((row < 0) | (column < 0), size[0] * size[1], row * size[1] + column)
    w = take_blocks(weights, rows.queries, columns.queries)
    w = torch.cat([w, torch.zeros_like(w[..., :1])], -1)
    entries = entries.flatten(4, 5).flatten(2, 3).unsqueeze(2).expand(*w.shape[:-1], -1)
    return join_blocks(w.gather(-1, entries) @ take_blocks(value, rows.keys, columns.keys), rows, columns)


def _window_entries(offsets: Tensor, kernel: int) -> Tensor:
    """Number of each key within its query's window, -1 outside, from `Blocks.offsets`."""
    first = torch.where(offsets < 0, 2 * kernel, offsets).amin(-1, keepdim=True)
    return torch.where(offsets < 0, -1, offsets - first)


def neighborhood_aggregate(
    weights: Tensor, value: Tensor, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> Tensor:
    """Sum the values of the window around every position with given weights.

    Args:
        weights: (B, heads, H, W, K²), any strides, used as they are: no softmax.
        value: (B, heads, H, W, D)
        kernel_size: Window size K, one for both axes or (rows, columns); odd or even.
        dilation: Step between the keys of a window, per axis; K times dilation must fit into the map.

    Returns:
        (B, heads, H, W, D), a view of (B, H, W, heads, D) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    kernel_size, dilation = pair(kernel_size), pair(dilation)
    check_rank("value", value, "(B, heads, H, W, D)")
    check_windows(value.shape[2:4], kernel_size, (1, 1), dilation)
    wanted = (*value.shape[:4], kernel_size[0] * kernel_size[1])
    check_shape("weights", weights, "(B, heads, H, W, K²)", wanted)
    check_kind(weights=weights, value=value)
    if wants_plain_aten():
        with no_autocast(weights.device.type):
            return decomposition(weights, value, kernel_size, dilation)
    return _forward(weights, value, kernel_size, dilation)


def _forward_fake(weights, value, kernel_size, dilation):
    """Shape, strides and dtype of the forward's result."""
    return empty_map(value)


def _backward_fake(grad, weights, value, kernel_size, dilation):
    """Shapes, strides and dtypes of the backward's results."""
    return empty_map(weights), empty_map(value)


_SETTINGS = "int[] kernel_size, int[] dilation"
_forward = define(
    "neighborhood_aggregate",
    f"(Tensor weights, Tensor value, {_SETTINGS}) -> Tensor",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("neighborhood_aggregate", "forward"),
)
_backward = define(
    "neighborhood_aggregate_backward",
    f"(Tensor grad, Tensor weights, Tensor value, {_SETTINGS}) -> (Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("neighborhood_aggregate", "backward"),
)
register_gradient(_forward, _backward, decomposition, keeps_result=False)
register(Operator("neighborhood_aggregate", neighborhood_aggregate, reference, decomposition))
