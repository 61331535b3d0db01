"""The door of `natten.py` for Dinat of transformers 5, which hands tensors over in an order that no NATTEN takes.

    import sys, visionattn_kernels.natten_transformers as natten
    sys.modules["natten"] = sys.modules["natten.functional"] = natten

before transformers is imported. Its `NeighborhoodAttention` (read in 5.23 and 5.24) splits (B, H, W, C) into heads and
exchanges the axes 1 and 2, so that queries, keys and values arrive as (B, W, H, heads, D) where NATTEN's calls want
(B, heads, H, W, D); from what comes back it expects (B, heads, H, W, D). Shapes alone cannot tell the two orders apart
(a map may have as many columns as heads), therefore this is a module of its own. Versions up to 4.53 hand over the
right order and want `natten.py`; those from 4.54 to 5.0 fail before they call NATTEN.
"""

from __future__ import annotations

from torch import Tensor

from visionattn_kernels import natten


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Scores of each query with the keys of its window.

    Args:
        query: (B, W, H, heads, D), scaled already.
        key: (B, W, H, heads, D)
        rpb: (heads, 2K - 1, 2K - 1) or None.
        kernel_size: Window K.
        dilation: Step between the keys of a window.

    Returns:
        (B, heads, H, W, K²)

    Raises:
        ValueError: An argument does not fit.
    """
    return natten.natten2dqkrpb(query.transpose(1, 3), key.transpose(1, 3), rpb, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Sums of the values of each window.

    Args:
        attn: (B, heads, H, W, K²), as from `natten2dqkrpb`.
        value: (B, W, H, heads, D)
        kernel_size: Window K.
        dilation: Step between the keys of a window.

    Returns:
        (B, heads, H, W, D)

    Raises:
        ValueError: An argument does not fit.
    """
    return natten.natten2dav(attn, value.transpose(1, 3), kernel_size, dilation)
