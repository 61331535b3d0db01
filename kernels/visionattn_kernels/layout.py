"""Memory layouts of the operators' results."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_map(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory (B, H, W, heads, D) for a result, seen as (B, heads, H, W, D)."""
    batch, heads, height, width, dim = like.shape
    return like.new_empty((batch, height, width, heads, dim), dtype=dtype).permute(0, 3, 1, 2, 4)
