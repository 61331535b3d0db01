"""How the CPU paths of the linear operators go through images and tokens: as many at a time as the cache holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of queries at a time and thread, 1 MiB in float32: with half as many, the products of a single head are up to
# 25 % slower at 28x28 and 56x56; more do not fit the second-level cache of a core.
AT_ONCE = 2**18


def image_groups(query: Tensor, at_once: int) -> Iterator[slice]:
    """Split the images of (B, heads, N, D), small ones into equal groups of about `at_once` elements a thread.

    An empty batch is one group.
    """
    batch = max(1, len(query))
    step = -(-batch // max(1, round(query.numel() / (at_once * torch.get_num_threads()))))
    return (slice(first, first + step) for first in range(0, batch, step))


def grouped(images: slice, *tensors: Tensor) -> list[Tensor]:
    """Images and heads of each tensor as one axis, (heads of all images, ...); a copy where strides need one."""
    return [x[images].flatten(0, 1) for x in tensors]


def token_chunks(query: Tensor) -> list[slice]:
    """Split the tokens of (..., N, D) evenly, to about `AT_ONCE` elements a thread."""
    tokens = query.shape[-2]
    step = max(1, -(-tokens // max(1, round(query.numel() / (AT_ONCE * torch.get_num_threads())))))
    return [slice(first, first + step) for first in range(0, tokens, step)]


def take(x: Tensor, some: slice, dtype: torch.dtype) -> Tensor:
    """Some tokens of (images, heads, N, D) as (heads of all images, n, D); a copy where strides need one."""
    return x[:, :, some].to(dtype).flatten(0, 1)


def put(out: Tensor, some: slice, result: Tensor) -> None:
    """Write some tokens' result (heads of all images, n, E) into (images, heads, N, E)."""
    out[:, :, some] = result.unflatten(0, out.shape[:2])
