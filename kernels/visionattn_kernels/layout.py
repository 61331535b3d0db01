"""Memory layouts of the operators' results."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_map(like: Tensor, dtype: torch.dtype | None = None, dim: int | None = None) -> Tensor:
    """Memory (B, H, W, heads, D) for a result, seen as (B, heads, H, W, D), the shape of `like` with `dim` for D.

    What stands between heads and D may also be other axes than H and W, such as N tokens.
    """
    batch, heads, *positions, like_dim = like.shape
    channels = like_dim if dim is None else dim
    return like.new_empty((batch, *positions, heads, channels), dtype=dtype).movedim(-2, 1)
