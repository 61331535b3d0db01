"""How launchers of the linear operators cut the tokens of a head, into blocks or into pieces that are summed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
from torch import Tensor

from visionattn_kernels.triton.launch import Launch, padded_dim
from visionattn_kernels.triton.tiles import entry_of
from visionattn_kernels.triton.tokens import sum_pieces_kernel

# Tokens that a program sums. In 16 bits sums of keys times values take as much memory as 3 % of both at 16 channels and
# 25 % at 128. A map of 56x56 makes seven pieces a head.
PIECE = 512


class TokenTiles(NamedTuple):
    """How a kernel cuts its work; an entry of a launcher's tables.

    Attributes:
        block: Tokens at a time.
        columns: Channels of values at a time, at most; None where a kernel takes all or none.
        num_warps, num_stages: As of `Launch`.
    """

    block: int
    columns: int | None
    num_warps: int
    num_stages: int


def token_launch(
    kernel,
    table: dict[tuple[int, int], TokenTiles],
    tensors: dict[str, Tensor],
    value: Tensor | None,
    products: int,
    piece: int | None = None,
    **others: Any,
) -> Launch:
    """The launch of `kernel` over all tokens of all heads, cut as `table` says.

    Args:
        kernel: The kernel.
        table: Its tiles, by `entry_of` the first tensor and `value`.
        tensors: Arguments (B, heads, N, ...), passed with their strides; the first has the channels of queries.
        value: Gives the channels of values; None where they take no part.
        products: Multiplications of a token for each pair of a channel of queries and one of values.
        piece: Tokens that a program sums; None where it owns a block.
        others: Other arguments, passed as they are.
    """
    first = next(iter(tensors.values()))
    batch, heads, tokens, dim = first.shape
    values = [] if value is None else [value]
    block, columns, num_warps, num_stages = table[entry_of(first, *values)]
    count = triton.cdiv(tokens, piece or block)
    arguments = {
        **{f"{name}_ptr": x for name, x in tensors.items()},
        **{f"{name}_strides": x.stride() for name, x in tensors.items()},
        **others,
        "heads": heads,
        "tokens": tokens,
        "pieces": count,
        "BLOCK": block,
        "DIM": dim,
        "BLOCK_D": padded_dim(dim),
        **({"PIECE": piece} if piece else {}),
    }
    for x in values:
        padded = padded_dim(x.shape[3])
        arguments |= {"DIM_E": x.shape[3], **({"BLOCK_E": padded} if piece else {})}
        arguments |= {"COLUMNS": min(columns, padded)} if columns else {}
    flops = 2 * products * batch * heads * tokens * dim * sum(x.shape[3] for x in values)
    return Launch(kernel, batch * heads * count, arguments, num_warps, num_stages, flops)


def sum_launch(pieces: Tensor, out: Tensor, factor: float, divisor: Tensor | None = None) -> Launch:
    """The launch that adds up the third axis of `pieces`, contiguous (B, heads, pieces, ...), times `factor`.

    `out` is (B, heads, ...) with heads at even distances and the rest contiguous. `divisor`, contiguous (B, heads),
    divides the sums of each head.
    """
    batch, heads, count = pieces.shape[:3]
    length, block = math.prod(out.shape[2:]), 256
    arguments = {"pieces_ptr": pieces, "divisor_ptr": divisor, "out_ptr": out, "out_stride": out.stride(1)}
    arguments |= {"length": length, "pieces": count, "factor": factor, "BLOCK": block}
    return Launch(sum_pieces_kernel, batch * heads * triton.cdiv(length, block), arguments, 4, 2, 0)
