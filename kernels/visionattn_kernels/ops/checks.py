"""What the operators demand of their tensors, and how they say so: the value seen and the value wanted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_kind(query: Tensor, **others: Tensor | None) -> None:
    """Tensors of one operator share dtype and device.

    Raises:
        ValueError: `query` is not floating point, or a tensor that is there has another dtype or device.
    """
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != query.dtype or tensor.device != query.device):
            wanted, seen = (f"{x.dtype} on {x.device}" for x in (query, tensor))
            raise ValueError(f"{name} must be as query, {wanted}, got {seen}")
    if not query.is_floating_point():
        raise ValueError(f"query must be floating point, got {query.dtype}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has as many axes as `axes`, such as "(B, heads, H, W, D)", names."""
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must be {axes}, got {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, axes: str, wanted: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has the shape `wanted`, whose axes `axes` names."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{name} must be {axes} = {tuple(wanted)}, got {tuple(tensor.shape)}")
