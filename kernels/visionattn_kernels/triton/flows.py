"""Device functions that the kernels of flow attention share: features, flows, and what is made of them.

Shapes: as in `flow_attention_kernels.py`.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.tokens import load_tokens, load_vector

# Rows of the four sums, and of their gradients.
OF_Q, OF_K, OF_TAKEN, OF_GIVEN = (tl.constexpr(row) for row in range(4))


@triton.jit
def load_features(ptr, places, plane, inside, strides, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] sigmoids of tokens; zero where not `inside` and beyond channel DIM."""
    x = load_tokens(ptr, places, plane, inside, strides, DIM, BLOCK_D)
    exists = inside[:, None]
    if DIM < BLOCK_D:
        exists = exists & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return tl.where(exists, tl.sigmoid(x), 0.0)


@triton.jit
def load_sum(ptr, head, row, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D] one of the four sums of a head, or its gradient."""
    return load_vector(ptr, 4 * head + row, DIM, BLOCK_D)


@triton.jit
def flow_of(features, total, inside, epsilon, DIM: tl.constexpr):
    """[BLOCK] (features + e) . (total + e) + e; 1 where not `inside`, because flows divide."""
    flow = tl.sum(features * (total + epsilon)[None, :], 1) + epsilon * (1 + tl.sum(total, 0) + DIM * epsilon)
    return tl.where(inside, flow, 1.0)


@triton.jit
def weighted_sum(features, weights, epsilon):
    """[BLOCK_D] the sum over tokens of weights, zero for those that are not there, times (features + e)."""
    return tl.sum(features * weights[:, None], 0) + epsilon * tl.sum(weights, 0)


@triton.jit
def gate_of(features, sums, inside, epsilon, DIM: tl.constexpr):
    """[BLOCK] the sigmoid of the sinks of queries, and what they take in; `sums` are of_k and of_given."""
    taken, sink = flow_of(features, sums[0], inside, epsilon, DIM), flow_of(features, sums[1], inside, epsilon, DIM)
    return tl.sigmoid(sink), taken


@triton.jit
def odds_of(source):
    """[BLOCK] the numbers of which the softmax over keys takes shares: of clamped sources, they need no maximum."""
    return tl.exp(tl.minimum(tl.maximum(source, -1.0), 1.0))


@triton.jit
def join(features, product, numbers, vectors):
    """[BLOCK, BLOCK_D] gradient of tokens: `product`, three numbers a token times vectors, a vector; by the sigmoid."""
    gradient = product + numbers[0][:, None] * vectors[0][None, :] + numbers[1][:, None] * vectors[1][None, :]
    gradient += numbers[2][:, None] * vectors[2][None, :] + vectors[3][None, :]
    return gradient * features * (1 - features)


@triton.jit
def weight_of(source, partition_ptr, head, tokens):
    """[BLOCK] N times the softmax over keys."""
    return odds_of(source) * (tokens / tl.load(partition_ptr + head))


@triton.jit
def gradient_of_source(along, weight, source, mean_ptr, head, inside):
    """[BLOCK] the gradient of the sources; `along` is that of the weights."""
    free = inside & (tl.abs(source) <= 1)
    return tl.where(free, weight * (along - tl.load(mean_ptr + head)), 0.0)


@triton.jit
def given_of(features, of_q, grad_of_given, inside, epsilon, DIM: tl.constexpr):
    """[BLOCK] what keys give out, and its gradient."""
    given = flow_of(features, of_q, inside, epsilon, DIM)
    return given, -tl.sum(features * grad_of_given[None, :], 1) / (given * given)
