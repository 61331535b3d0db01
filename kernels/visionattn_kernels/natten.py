"""The calls that NATTEN removed in 0.20, for code that is stuck on them: `natten.functional` and its modules of old.

    import sys, visionattn_kernels.natten as natten
    sys.modules["natten"] = sys.modules["natten.functional"] = natten

Names, order of arguments and layouts are those of NATTEN 0.14 (`natten2dqkrpb`, ...) and 0.17 (`na2d_qk`, ...). Scores
and weights are (B, heads, H, W, K²), keys of a window row by row. Causal windows and additional keys are not here.
transformers 5 hands its tensors over in another order; `natten_transformers.py` is for it.

The scores are those of `neighborhood_attention`'s window rule; their product with the values is
`neighborhood_aggregate`. Whoever can should call `neighborhood_attention`, which never keeps the K² scores a query.
"""

# No `from __future__ import annotations`: TorchScript reads the modules' annotations.
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionattn_kernels.ops.checks import check_kind, check_rank, check_shape
from visionattn_kernels.ops.neighborhood_aggregate import neighborhood_aggregate
from visionattn_kernels.ops.windows import check_windows, pair, window_offsets


def _entries(length: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the keys of each query of an axis, and their entries in a relative bias; both (length, K)."""
    offsets = window_offsets(length, kernel, 1, dilation).to(device)
    seen = offsets >= 0
    return seen.nonzero()[:, 1].view(length, kernel), offsets[seen].view(length, kernel)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Products of every query with the keys of its window, plus a relative bias.

    Args:
        query: (B, heads, H, W, D), used as it is: no scale.
        key: (B, heads, H, W, D)
        kernel_size: Window K, one for both axes or (rows, columns).
        dilation: Step between the keys of a window, likewise.
        additional_keys: Must be None.
        is_causal: Must be False.
        rpb: (heads, 2K - 1, 2K - 1), indexed by key minus query plus K - 1.

    Returns:
        (B, heads, H, W, K²)

    Raises:
        ValueError: An argument does not fit, or is one of those that are not here.
    """
    _check_absent(additional_keys, is_causal)
    size, gap = pair(kernel_size), pair(dilation)
    check_rank("query", query, "(B, heads, H, W, D)")
    check_shape("key", key, "(B, heads, H, W, D)", tuple(query.shape))
    check_kind(query=query, key=key)
    check_windows(query.shape[2:4], size, (1, 1), gap)
    axes = [_entries(n, k, d, query.device) for n, k, d in zip(query.shape[2:4], size, gap, strict=True)]
    (rows, row_entries), (columns, column_entries) = axes
    scores = []
    for i in range(size[0]):
        line = key[:, :, rows[:, i]]
        scores += [(query * line[:, :, :, columns[:, j]]).sum(-1) for j in range(size[1])]
    scores = torch.stack(scores, -1)
    if rpb is None:
        return scores
    check_shape("rpb", rpb, "(heads, 2K - 1, 2K - 1)", (query.shape[1], 2 * size[0] - 1, 2 * size[1] - 1))
    bias = rpb[:, row_entries[:, None, :, None], column_entries[None, :, None, :]]
    return scores + bias.flatten(-2).to(scores.dtype)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Sum of the values of every window with given weights: `neighborhood_aggregate`.

    Args:
        attn: (B, heads, H, W, K²)
        value: (B, heads, H, W, D)
        kernel_size: Window K, one for both axes or (rows, columns).
        dilation: Step between the keys of a window, likewise.
        additional_values: Must be None.
        is_causal: Must be False.

    Returns:
        (B, heads, H, W, D)

    Raises:
        ValueError: An argument does not fit, or is one of those that are not here.
    """
    _check_absent(additional_values, is_causal)
    return neighborhood_aggregate(attn, value, kernel_size, dilation)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """As `na2d_qk` along one axis: (B, heads, L, D) to (B, heads, L, K), `rpb` (heads, 2K - 1)."""
    check_rank("query", query.unsqueeze(2), "(B, heads, 1, L, D)")
    size, gap = (1, _single(kernel_size)), (1, _single(dilation))
    rpb = None if rpb is None else rpb.unsqueeze(1)
    scores = na2d_qk(query.unsqueeze(2), key.unsqueeze(2), size, gap, additional_keys, is_causal, rpb)
    return scores.squeeze(2)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """As `na2d_av` along one axis: weights (B, heads, L, K) and values (B, heads, L, D) to (B, heads, L, D)."""
    size, gap = (1, _single(kernel_size)), (1, _single(dilation))
    return na2d_av(attn.unsqueeze(2), value.unsqueeze(2), size, gap, additional_values, is_causal).squeeze(2)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """`na2d_qk` under its name and order of arguments up to 0.15."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """`na2d_av` under its name up to 0.15."""
    return na2d_av(attn, value, kernel_size, dilation)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """`na1d_qk` under its name and order of arguments up to 0.15."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """`na1d_av` under its name up to 0.15."""
    return na1d_av(attn, value, kernel_size, dilation)


class _NeighborhoodAttention(nn.Module):
    """What the modules of both dimensions share. Parameters: `qkv`, `rpb` where asked for, `proj`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        is_causal: bool = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        _check_absent(None, is_causal)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = self._per_axis(kernel_size)
        self.dilation = self._per_axis(dilation)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        shape = (num_heads, *(2 * size - 1 for size in self.kernel_size))
        self.rpb = nn.Parameter(torch.zeros(shape)) if rel_pos_bias else None
        if rel_pos_bias:
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, *axes, dim) to the same shape; a window must fit along each axis."""
        if x.ndim != len(self.kernel_size) + 2:
            raise ValueError(f"x must have {len(self.kernel_size) + 2} axes, got {tuple(x.shape)}")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-3, 0).movedim(-2, 2)
        query, key, value = qkv.unbind(0)
        qk, av = (na1d_qk, na1d_av) if len(self.kernel_size) == 1 else (na2d_qk, na2d_av)
        scores = qk(query * self.scale, key, self.kernel_size, self.dilation, rpb=self.rpb)
        out = av(self.attn_drop(scores.softmax(-1)), value, self.kernel_size, self.dilation)
        return self.proj_drop(self.proj(out.movedim(1, -2).flatten(-2)))


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """NATTEN 0.17's module on (B, L, dim). Arguments as there; causal windows raise ValueError."""

    @staticmethod
    def _per_axis(value):
        return (_single(value),)


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """NATTEN 0.17's module on (B, H, W, dim). Arguments as there; causal windows raise ValueError."""

    @staticmethod
    def _per_axis(value):
        return pair(value)


def _single(value: int | Sequence[int]) -> int:
    """The one number of one axis."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if len(numbers) != 1:
        raise ValueError(f"expected one number for the one axis, got {value!r}")
    return numbers[0]


def _check_absent(additional: Tensor | None, is_causal: bool | Sequence[bool]) -> None:
    """Raise ValueError for the two things that are not here."""
    if additional is not None:
        raise ValueError("additional keys and values are not supported, wanted None")
    if is_causal if isinstance(is_causal, bool) else any(is_causal):
        raise ValueError(f"causal windows are not supported, got is_causal={is_causal!r}, wanted False")
