"""Softmax over blocks of scores: device functions that the kernels of attention share.

Scores and their logarithms are in base 2, because exp2 is what the hardware has; only what is stored is natural.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_start(TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """State before any key: highest scores [TILE], sums [TILE] and sums of values [TILE, BLOCK_D]."""
    highest = tl.full([TILE], float("-inf"), tl.float32)
    return highest, tl.zeros([TILE], tl.float32), tl.zeros([TILE, BLOCK_D], tl.float32)


@triton.jit
def softmax_step(scores, value, highest, total, out):
    """The state after a block of keys: [TILE, BLOCK] `scores`, -inf where unseen, and [BLOCK, BLOCK_D] `value`."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    # A query that has seen no key yet has nothing to shrink, and -inf minus -inf would be NaN.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(highest - finite)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None], input_precision="ieee")
    return higher, total, out


@triton.jit
def softmax_end(highest, total, out):
    """Results [TILE, BLOCK_D], and natural logarithms of the softmax's sums [TILE]."""
    return out * (1.0 / total)[:, None], (highest + tl.log2(total)) * LN2
