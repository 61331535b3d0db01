"""How launchers cut maps into what programs own and what their loops take at once."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor

from visionattn_kernels.triton.launch import padded_dim

Pair = tuple[int, int]


class Tiles(NamedTuple):
    """How a kernel cuts its work; an entry of a launcher's tables.

    Attributes:
        tile: What a program owns: (rows, columns) of a map or, where positions are counted through, how many at most.
        block: Positions that its loop takes at once, a power of two.
        num_warps, num_stages: As of `Launch`.
    """

    tile: int | Pair
    block: int
    num_warps: int
    num_stages: int


def entry_of(*tensors: Tensor) -> Pair:
    """Key of the tables of tiles: bytes an element, and the padded number of channels of the widest of `tensors`."""
    return tensors[0].element_size(), padded_dim(max(x.shape[-1] for x in tensors))


@lru_cache(maxsize=256)
def block_shape(tile: Pair, kernel_size: Pair, block: int) -> Pair:
    """The rectangle of `block` members that covers what a tile's windows reach in the fewest steps.

    That is an area of (tile + K - 1), wherever the border does not cut it. Of several, the one nearest to a square. On
    each axis tile and block make 16 pairs at least, the fewest that a matrix product in `relative_bias.py` sums over.
    """
    rows, columns = (length + size - 1 for length, size in zip(tile, kernel_size, strict=True))
    shapes = [(1 << power, block >> power) for power in range(block.bit_length())]
    shapes = [shape for shape in shapes if tile[0] * shape[0] >= 16 and tile[1] * shape[1] >= 16]
    return min(shapes, key=lambda shape: (-(-rows // shape[0]) * -(-columns // shape[1]), sum(shape)))


def tiles_per_head(size: Pair, tile: Pair, dilation: Pair = (1, 1)) -> int:
    """Tiles of all residue maps of a map of one head."""
    axes = zip(size, dilation, tile, strict=True)
    return math.prod(gap * triton.cdiv(triton.cdiv(length, gap), side) for length, gap, side in axes)
