"""Which keys a query sees: the window rule of neighborhood attention.

Along an axis of length L with dilation d, position i belongs to the residue class i mod d and is its member number
p = i div d. A class has n members and is an axis of its own: its windows hold K consecutive members and shift inwards
at both ends, so that every query sees exactly K keys (Hassani et al., Neighborhood Attention Transformer,
arXiv:2204.07143; dilation: arXiv:2209.15001). With stride S the members of a group of S share the window of the group's
centre (Generalized Neighborhood Attention, arXiv:2504.16922).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
