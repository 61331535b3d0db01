"""Neighborhood attention in two dimensions: every query attends to the window of keys around it.

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[j - i]) v[j],    j in window(i)

The window of K keys an axis is centred on the query, dilated, and shifted inwards at the border (`windows.py` has the
rule), so that every query sees the same number of keys. The bias depends on key minus query, counted in steps of the
dilation. Papers: NAT (arXiv:2204.07143), DiNAT (arXiv:2209.15001), stride: GNA (arXiv:2504.16922).

Shapes: B batch, H and W the map, D channels a head, K window.
    query, key, value, out: (B, heads, H, W, D)      bias: (heads, 2K-1, 2K-1)      lse: (B, heads, H, W)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn_kernels.cpu import neighborhood_attention as cpu
from visionattn_kernels.layout import empty_map
from visionattn_kernels.op import Operator, define, launcher, no_autocast, register, register_gradient, wants_plain_aten
from visionattn_kernels.ops.checks import check_filled, check_kind, check_shape
from visionattn_kernels.ops.windows import (
    Pair,
    check_windows,
    join_blocks,
    pair,
    take_blocks,
    window_blocks,
    window_offsets,
)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, dense: quadratic in the area of the map. Arguments as of `neighborhood_attention`."""
    heads, height, width, dim = query.shape[1:]
    kernel_size, stride, dilation = (pair(value) for value in (kernel_size, stride, dilation))
    rows = window_offsets(height, kernel_size[0], stride[0], dilation[0])[:, None, :, None]
    columns = window_offsets(width, kernel_size[1], stride[1], dilation[1])[None, :, None, :]
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    scores = q @ k.transpose(-2, -1) * (dim**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias[:, rows.clamp(min=0), columns.clamp(min=0)].view(heads, *scores.shape[2:])
    outside = ((rows < 0) | (columns < 0)).view(scores.shape[2:]).to(query.device)
    return (scores.masked_fill(outside, float("-inf")).softmax(-1) @ v).view(query.shape)


def decomposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The operator in plain aten, for exported programs: blocks of queries with their keys under an additive mask."""
    kernel_size, stride, dilation = (pair(value) for value in (kernel_size, stride, dilation))
    rows, columns = (
        window_blocks(*axis, device=query.device)
        for axis in zip(query.shape[2:4], kernel_size, stride, dilation, strict=True)
    )
    row, column = rows.offsets[:, None, :, None, :, None], columns.offsets[None, :, None, :, None, :]
    outside = ((row < 0) | (column < 0)).flatten(4, 5).flatten(2, 3).unsqueeze(2)
    q = take_blocks(query, rows.queries, columns.queries)
    k, v = (take_blocks(x, rows.keys, columns.keys) for x in (key, value))
    scores = q @ k.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        entries = bias[:, row.clamp(min=0), column.clamp(min=0)]
        scores = scores + entries.flatten(5, 6).flatten(3, 4).permute(1, 2, 0, 3, 4)
    weights = scores.masked_fill(outside, float("-inf")).softmax(-1)
    return join_blocks(weights @ v, rows, columns)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from every position of a map to the window around it.

    Window rule and argument names are those of NATTEN's `na2d`; the layout is heads first, any strides.

    Args:
        query: (B, heads, H, W, D)
        key: As `query`.
        value: As `query`.
        kernel_size: Window size K, one for both axes or (rows, columns); odd or even. An even window reaches one key
            further to the left than to the right.
        stride: Queries that share a window, per axis, at most K.
        dilation: Step between the keys of a window, per axis; K times dilation must fit into the map.
        bias: Relative bias (heads, 2K-1, 2K-1), indexed by key minus query plus K - 1; trainable.
        scale: Factor of the scores, by default D ** -0.5.

    Returns:
        (B, heads, H, W, D), a view of (B, H, W, heads, D) memory, so that joining the heads copies nothing.

    Raises:
        ValueError: An argument does not fit; the message prints the value seen and the value wanted.
    """
    kernel_size, stride, dilation = (pair(value) for value in (kernel_size, stride, dilation))
    _check(query, key, value, kernel_size, stride, dilation, bias)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    # Where a trace makes sizes tensors, the op would keep such a window as the number that it is now.
    if wants_plain_aten() or any(isinstance(size, Tensor) for size in kernel_size):
        with no_autocast(query.device.type):
            return decomposition(query, key, value, kernel_size, stride, dilation, bias, scale)
    return _forward(query, key, value, bias, kernel_size, stride, dilation, scale)[0]


def _check(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair, bias: Tensor | None
) -> None:
    """Raise ValueError where the arguments do not fit together."""
    check_filled("query", query, "(B, heads, H, W, D)")
    for name, tensor in (("key", key), ("value", value)):
        check_shape(name, tensor, "query's shape", query.shape)
    check_kind(query=query, key=key, value=value, bias=bias)
    check_windows(query.shape[2:4], kernel_size, stride, dilation)
    if bias is not None:
        wanted = (query.shape[1], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        check_shape("bias", bias, "(heads, 2K-1, 2K-1)", wanted)


def _forward_fake(query, key, value, bias, kernel_size, stride, dilation, scale):
    """Shapes, strides and dtypes of the forward's results."""
    lse = query.new_empty(query.shape[:4], dtype=torch.promote_types(query.dtype, torch.float32))
    return empty_map(query), lse


def _backward_fake(grad, query, key, value, bias, out, lse, kernel_size, stride, dilation, scale):
    """Shapes, strides and dtypes of the backward's results."""
    return *(empty_map(query) for _ in range(3)), query.new_empty(0 if bias is None else bias.shape)


def _plain(query, key, value, bias, kernel_size, stride, dilation, scale):
    """The decomposition, with the arguments of the op."""
    return decomposition(query, key, value, kernel_size, stride, dilation, bias, scale)


_SETTINGS = "int[] kernel_size, int[] stride, int[] dilation, float scale"
_forward = define(
    "neighborhood_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_SETTINGS}) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    fake=_forward_fake,
    cuda=launcher("neighborhood_attention", "forward"),
)
_backward = define(
    "neighborhood_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.backward,
    fake=_backward_fake,
    cuda=launcher("neighborhood_attention", "backward"),
)
register_gradient(_forward, _backward, _plain, keeps_result=True)
register(Operator("neighborhood_attention", neighborhood_attention, reference, decomposition))
