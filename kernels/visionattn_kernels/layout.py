"""Memory layouts of the operators' results."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_map(like: Tensor, dtype: torch.dtype | None = None, dim: int | None = None) -> Tensor:
    """Memory (B, H, W, heads, D) for a result, seen as (B, heads, H, W, D), the shape of `like` with `dim` for D."""
    batch, heads, height, width, like_dim = like.shape
    channels = like_dim if dim is None else dim
    return like.new_empty((batch, height, width, heads, channels), dtype=dtype).permute(0, 3, 1, 2, 4)
