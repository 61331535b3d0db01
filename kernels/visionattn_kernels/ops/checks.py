"""What the operators demand of their tensors, and how they say so: the value seen and the value wanted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_kind(**tensors: Tensor | None) -> None:
    """Tensors of one operator share dtype and device.

    Raises:
        ValueError: The first tensor is not floating point, or another that is there has not its dtype and device.
    """
    first, model = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != model.dtype or tensor.device != model.device):
            wanted, seen = (f"{x.dtype} on {x.device}" for x in (model, tensor))
            raise ValueError(f"{name} must be as {first}, {wanted}, got {seen}")
    if not model.is_floating_point():
        raise ValueError(f"{first} must be floating point, got {model.dtype}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has as many axes as `axes`, such as "(B, heads, H, W, D)", names."""
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must be {axes}, got {tuple(tensor.shape)}")


def check_filled(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has the axes `axes`, "(B, heads, H, W, D)" or the like, none but B empty."""
    check_rank(name, tensor, axes)
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must be {axes} with at least 1 of each but B, got {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, axes: str, wanted: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has the shape `wanted`, whose axes `axes` names."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{name} must be {axes} = {tuple(wanted)}, got {tuple(tensor.shape)}")


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless query and key are (B, heads, N, D), value is (B, heads, N, E), none without tokens."""
    check_filled("query", query, "(B, heads, N, D)")
    check_rank("value", value, "(B, heads, N, E)")
    check_shape("key", key, "query's shape", query.shape)
    check_shape("value", value, "query's shape but for the last axis", (*query.shape[:3], value.shape[-1]))
    check_kind(query=query, key=key, value=value)


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError unless `epsilon` is positive."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
