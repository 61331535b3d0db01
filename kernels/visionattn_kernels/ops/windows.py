"""Which keys a query sees: the window rule of neighborhood attention.

Along an axis of length L with dilation d, position i belongs to the residue class i mod d and is its member number
p = i div d. A class has n members and is an axis of its own: its windows hold K consecutive members and shift inwards
at both ends, so that every query sees exactly K keys (Hassani et al., Neighborhood Attention Transformer,
arXiv:2204.07143; dilation: arXiv:2209.15001). With stride S the members of a group of S share the window of the group's
centre (Generalized Neighborhood Attention, arXiv:2504.16922).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


def pair(value: int | Sequence[int]) -> Pair:
    """One number for both axes, or one an axis.

    Raises:
        ValueError: There are neither one nor two numbers.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2:
        raise ValueError(f"expected one number or one per axis (rows, columns), got {value!r}")
    return both


def check_windows(shape: Sequence[int], kernel_size: Pair, stride: Pair, dilation: Pair) -> None:
    """Raise ValueError where a window does not fit into a map of `shape` (rows, columns)."""
    for axis, length, kernel, step, gap in zip(("rows", "columns"), shape, kernel_size, stride, dilation, strict=True):
        if kernel < 1 or gap < 1 or not 1 <= step <= kernel:
            raise ValueError(
                f"{axis}: kernel_size and dilation must be at least 1 and stride between 1 and kernel_size, "
                f"got kernel_size={kernel}, dilation={gap}, stride={step}"
            )
        if kernel * gap > length:
            raise ValueError(
                f"{axis}: the window must fit into the map, got kernel_size {kernel} * dilation {gap} = "
                f"{kernel * gap} > {length}"
            )


def window_start(places: Tensor, members: Tensor | int, kernel: int, stride: int) -> Tensor:
    """First member of the window of each query.

    Args:
        places: (n,) number of each query within its residue class.
        members: Size of the residue class, one for all or one a query.
        kernel: Window size K.
        stride: Queries that share a window.

    Returns:
        (n,) first member of the window, between 0 and members - kernel.
    """
    last = torch.as_tensor(members) - 1
    centre = torch.minimum(places // stride * stride + stride // 2, last)
    return torch.minimum((centre - kernel // 2).clamp(min=0), last + 1 - kernel)


def window_offsets(length: int, kernel: int, stride: int, dilation: int) -> Tensor:
    """Offsets of all keys of an axis from all queries, where the query sees the key.

    Returns:
        (length, length) int64, indexed [query, key]: key minus query in members plus K - 1, which is between 0 and
        2K - 2 and the index into a relative bias; -1 where the key is outside the query's window.
    """
    position = torch.arange(length)
    residue, place = position % dilation, position // dilation
    members = (length - residue + dilation - 1) // dilation
    start = window_start(place, members, kernel, stride)[:, None]
    seen = (residue[:, None] == residue) & (place >= start) & (place < start + kernel)
    return torch.where(seen, place - place[:, None] + kernel - 1, -1)


def relative_entries(queries: int, window: int, device: torch.device | None = None) -> Tensor:
    """Key minus query plus window - 1, (queries, window): entries of a table of all 2 window - 1 relative positions."""
    return torch.arange(window, device=device) - torch.arange(queries, device=device)[:, None] + window - 1


class Blocks(NamedTuple):
    """An axis cut into blocks of queries with the keys that each needs, as index tensors.

    Attributes:
        queries: (n, T) position of each query; the last one of its residue class again where the block is not full.
        keys: (n, R) position of each key, enough for the windows of all queries of the block.
        offsets: (n, T, R) as in `window_offsets`.
        places: (length,) where each position stands among the flattened `queries`.
    """

    queries: Tensor
    keys: Tensor
    offsets: Tensor
    places: Tensor


def window_blocks(
    length: int, kernel: int, stride: int, dilation: int, size: int = 8, device: torch.device | None = None
) -> Blocks:
    """Cut an axis into blocks of `size` queries of one residue class.

    Plain arithmetic on tensors, so that `length` may be symbolic: this is how exported programs find their windows.
    """
    per_class = ((length + dilation - 1) // dilation + size - 1) // size
    block = torch.arange(dilation * per_class, device=device)[:, None]
    residue = block // per_class
    members = (length - residue + dilation - 1) // dilation
    place = torch.minimum(block % per_class * size + torch.arange(size, device=device), members - 1)
    start = window_start(place, members, kernel, stride)
    # The windows of `size` consecutive queries start at most size + stride - 2 members apart.
    key = start[:, :1] + torch.arange(size + stride + kernel - 2, device=device)
    seen = (key[:, None] >= start[:, :, None]) & (key[:, None] < start[:, :, None] + kernel)
    offsets = torch.where(seen, key[:, None] - place[:, :, None] + kernel - 1, -1)
    position = torch.arange(length, device=device)
    member = position // dilation
    places = (position % dilation * per_class + member // size) * size + member % size
    return Blocks(residue + dilation * place, (residue + dilation * key).clamp(max=length - 1), offsets, places)


def take_blocks(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Copy blocks of a map.

    Args:
        x: (B, heads, H, W, D)
        rows: (m, S) rows of each of m blocks.
        columns: (n, T) columns of each of n blocks.

    Returns:
        (B, m, n, heads, S T, D)
    """
    taken = x.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    return taken.unflatten(3, columns.shape).unflatten(2, rows.shape).permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)


def join_blocks(blocks: Tensor, rows: Blocks, columns: Blocks) -> Tensor:
    """Put the blocks (B, m, n, heads, S T, D) of queries together to a map, (B, heads, H, W, D)."""
    blocks = blocks.unflatten(4, (rows.queries.shape[1], columns.queries.shape[1]))
    joined = blocks.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return joined.index_select(1, rows.places).index_select(2, columns.places).permute(0, 3, 1, 2, 4)
