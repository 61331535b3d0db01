"""Flow attention in Triton, the kernels: four passes over the tokens, and five backward.

Every pass needs sums over all tokens that the one before gives. Forward: sums of the features, sums of the features
over their flow, sums of keys times values, results of queries. Backward: how the sinks count, the gradient of the
moments, that of values and how the flows of keys count, then queries, then keys. A pass computes features and flows
anew, in float32; none of them is in memory.

The names are those of `cpu/flow_attention.py`: `taken` and `given` are what comes in and goes out, `of_q`, `of_k`,
`of_taken` and `of_given` the sums of f(q), f(k), f(q) / taken and f(k) / given, `along` the inner product of a query's
result with its gradient, or of a value with its gradient over its weight.

Shapes: BLOCK tokens at a time; BLOCK_D channels of queries and keys, and BLOCK_E of values, all of them and padded;
COLUMNS channels of values at a time. `sums` is (B, heads, 4, D).
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.flows import (
    OF_GIVEN,
    OF_K,
    OF_Q,
    OF_TAKEN,
    flow_of,
    gate_of,
    given_of,
    gradient_of_source,
    join,
    load_features,
    load_sum,
    odds_of,
    weight_of,
    weighted_sum,
)
from visionattn_kernels.triton.tokens import (
    load_matrix,
    load_tokens,
    locate_block,
    locate_tokens,
    store_matrix,
    store_tokens,
    store_vector,
    wide_dot,
)


@triton.jit
def _sum_features(
    tensors, sums_ptr, pieces_ptr, strides, sizes, epsilon, PIECE: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr
):
    """Sums over a piece of the features of queries and of keys; where `sums_ptr` is not None, of those over their flow.

    `sizes` are heads, tokens and pieces, DIMS are DIM and BLOCK_D; the result is (B, heads, pieces, 2, D).
    """
    heads, tokens, pieces = sizes
    plane, piece = locate_tokens(heads, pieces)
    head = plane[0] * heads + plane[1]
    if sums_ptr is not None:
        of_q, of_k = load_sum(sums_ptr, head, OF_Q, DIMS[0], DIMS[1]), load_sum(sums_ptr, head, OF_K, DIMS[0], DIMS[1])
    # [BLOCK_D]
    of_queries = tl.zeros([DIMS[1]], tl.float32)
    of_keys = tl.zeros([DIMS[1]], tl.float32)
    for start in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < tokens
        # [BLOCK, BLOCK_D]
        query = load_features(tensors[0], places, plane, inside, strides[0], DIMS[0], DIMS[1])
        key = load_features(tensors[1], places, plane, inside, strides[1], DIMS[0], DIMS[1])
        if sums_ptr is not None:
            query = query / flow_of(query, of_k, inside, epsilon, DIMS[0])[:, None]
            key = key / flow_of(key, of_q, inside, epsilon, DIMS[0])[:, None]
        of_queries += tl.sum(query, 0)
        of_keys += tl.sum(key, 0)
    number = 2 * tl.program_id(0).to(tl.int64)
    store_vector(pieces_ptr, number, of_queries, DIMS[0], DIMS[1])
    store_vector(pieces_ptr, number + 1, of_keys, DIMS[0], DIMS[1])


@triton.jit
def flow_attention_sums_kernel(
    query_ptr,
    key_ptr,
    pieces_ptr,
    query_strides,
    key_strides,
    heads,
    tokens,
    pieces,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over a piece of the tokens of f(q) and f(k)."""
    tensors, strides, sizes = (query_ptr, key_ptr), (query_strides, key_strides), (heads, tokens, pieces)
    _sum_features(tensors, None, pieces_ptr, strides, sizes, 0.0, PIECE, BLOCK, (DIM, BLOCK_D))


@triton.jit
def flow_attention_flow_sums_kernel(
    query_ptr,
    key_ptr,
    sums_ptr,
    pieces_ptr,
    query_strides,
    key_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over a piece of the tokens of f(q) over what it takes in and of f(k) over what it gives out."""
    tensors, strides, sizes = (query_ptr, key_ptr), (query_strides, key_strides), (heads, tokens, pieces)
    _sum_features(tensors, sums_ptr, pieces_ptr, strides, sizes, epsilon, PIECE, BLOCK, (DIM, BLOCK_D))


@triton.jit
def flow_attention_moments_kernel(
    key_ptr,
    value_ptr,
    sums_ptr,
    moments_ptr,
    partition_ptr,
    key_strides,
    value_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums over a piece of the tokens of f(k) times the odds times v, and of the odds."""
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    plane, piece = locate_tokens(heads, pieces)
    of_taken = load_sum(sums_ptr, plane[0] * heads + plane[1], OF_TAKEN, DIM, BLOCK_D)
    # [BLOCK_D, BLOCK_E], [BLOCK]
    moments = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    partition = tl.zeros([BLOCK], tl.float32)
    for start in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < tokens
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E], [BLOCK]
        features = load_features(key_ptr, places, plane, inside, key_strides, DIM, BLOCK_D)
        values = load_tokens(value_ptr, places, plane, inside, value_strides, DIM_E, BLOCK_E)
        odds = tl.where(inside, odds_of(flow_of(features, of_taken, inside, epsilon, DIM)), 0.0)
        partition += odds
        moments += wide_dot(tl.trans(features * odds[:, None]), values, dtype, True, False)
    number = tl.program_id(0).to(tl.int64)
    store_matrix(moments_ptr, number, moments, (DIM, DIM_E), (BLOCK_D, BLOCK_E))
    tl.store(partition_ptr + number, tl.sum(partition, 0))


@triton.jit
def flow_attention_fwd_kernel(
    query_ptr,
    sums_ptr,
    moments_ptr,
    out_ptr,
    query_strides,
    out_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Results of a block of queries."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    sums = load_sum(sums_ptr, head, OF_K, DIM, BLOCK_D), load_sum(sums_ptr, head, OF_GIVEN, DIM, BLOCK_D)
    # [BLOCK, BLOCK_D], [BLOCK]
    features = load_features(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D)
    gate, taken = gate_of(features, sums, inside, epsilon, DIM)
    for first in range(0, DIM_E, COLUMNS):
        moments = load_matrix(moments_ptr, head, (DIM, DIM_E), (BLOCK_D, COLUMNS), first)
        # [BLOCK, COLUMNS]
        out = wide_dot(features, moments, dtype, True, True) * (gate / taken)[:, None]
        store_tokens(out_ptr, out, places, plane, inside, out_strides, DIM_E, COLUMNS, first)


@triton.jit
def _times_transposed(
    ptr,
    matrix_ptr,
    places,
    plane,
    inside,
    strides,
    head,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[BLOCK, BLOCK_D] values of tokens, or gradients of their results, times a transposed matrix of the head."""
    product = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, DIMS[1], COLUMNS):
        # [BLOCK_D, COLUMNS], [BLOCK, COLUMNS]
        matrix = load_matrix(matrix_ptr, head, DIMS, (BLOCK_D, COLUMNS), first)
        values = load_tokens(ptr, places, plane, inside, strides, DIMS[1], COLUMNS, first)
        product += wide_dot(values, tl.trans(matrix), ptr.dtype.element_ty, False, True)
    return product


@triton.jit
def flow_attention_bwd_sink_kernel(
    grad_ptr,
    query_ptr,
    sums_ptr,
    moments_ptr,
    of_given_ptr,
    mean_ptr,
    grad_strides,
    query_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The share of a block of queries in the gradient of of_given, and in the sum of results times gradients.

    That sum is the inner product of the moments and their gradient, hence N times the mean that the softmax takes off.
    """
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    sums = load_sum(sums_ptr, head, OF_K, DIM, BLOCK_D), load_sum(sums_ptr, head, OF_GIVEN, DIM, BLOCK_D)
    # [BLOCK, BLOCK_D], [BLOCK]
    product = _times_transposed(
        grad_ptr, moments_ptr, places, plane, inside, grad_strides, head, (DIM, DIM_E), BLOCK, BLOCK_D, COLUMNS
    )
    features = load_features(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D)
    gate, taken = gate_of(features, sums, inside, epsilon, DIM)
    along = tl.sum(features * product, 1) * gate / taken
    number = tl.program_id(0).to(tl.int64)
    store_vector(of_given_ptr, number, weighted_sum(features, along * (1 - gate), epsilon), DIM, BLOCK_D)
    tl.store(mean_ptr + number, tl.sum(along, 0))


@triton.jit
def flow_attention_bwd_moments_kernel(
    query_ptr,
    grad_ptr,
    sums_ptr,
    grad_moments_ptr,
    query_strides,
    grad_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums over a piece of the tokens: the gradient of the moments."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    plane, piece = locate_tokens(heads, pieces)
    head = plane[0] * heads + plane[1]
    sums = load_sum(sums_ptr, head, OF_K, DIM, BLOCK_D), load_sum(sums_ptr, head, OF_GIVEN, DIM, BLOCK_D)
    # [BLOCK_D, BLOCK_E]
    moments = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < tokens
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E], [BLOCK]
        features = load_features(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D)
        grad = load_tokens(grad_ptr, places, plane, inside, grad_strides, DIM_E, BLOCK_E)
        gate, taken = gate_of(features, sums, inside, epsilon, DIM)
        moments += wide_dot(tl.trans(features * (gate / taken)[:, None]), grad, dtype, True, False)
    store_matrix(grad_moments_ptr, tl.program_id(0).to(tl.int64), moments, (DIM, DIM_E), (BLOCK_D, BLOCK_E))


@triton.jit
def flow_attention_bwd_value_kernel(
    key_ptr,
    value_ptr,
    grad_value_ptr,
    sums_ptr,
    grad_sums_ptr,
    partition_ptr,
    grad_moments_ptr,
    mean_ptr,
    of_q_ptr,
    of_taken_ptr,
    key_strides,
    value_strides,
    grad_value_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of values, and the share of its keys in the gradients of of_q and of_taken."""
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    # [BLOCK, BLOCK_D], [BLOCK]
    features = load_features(key_ptr, places, plane, inside, key_strides, DIM, BLOCK_D)
    source = flow_of(features, load_sum(sums_ptr, head, OF_TAKEN, DIM, BLOCK_D), inside, epsilon, DIM)
    weight = weight_of(source, partition_ptr, head, tokens)
    along = tl.zeros([BLOCK], tl.float32)
    for first in range(0, DIM_E, COLUMNS):
        # [BLOCK_D, COLUMNS], [BLOCK, COLUMNS]
        grad_moments = load_matrix(grad_moments_ptr, head, (DIM, DIM_E), (BLOCK_D, COLUMNS), first)
        values = load_tokens(value_ptr, places, plane, inside, value_strides, DIM_E, COLUMNS, first)
        product = wide_dot(features, grad_moments, dtype, True, True)
        along += tl.sum(product * values, 1)
        grad_value = product * weight[:, None]
        store_tokens(grad_value_ptr, grad_value, places, plane, inside, grad_value_strides, DIM_E, COLUMNS, first)
    by_source = gradient_of_source(along, weight, source, mean_ptr, head, inside)
    of_q, grad_of_given = (
        load_sum(sums_ptr, head, OF_Q, DIM, BLOCK_D),
        load_sum(grad_sums_ptr, head, OF_GIVEN, DIM, BLOCK_D),
    )
    _, by_given = given_of(features, of_q, grad_of_given, inside, epsilon, DIM)
    number = tl.program_id(0).to(tl.int64)
    store_vector(of_q_ptr, number, weighted_sum(features, by_given, epsilon), DIM, BLOCK_D)
    store_vector(of_taken_ptr, number, weighted_sum(features, by_source, epsilon), DIM, BLOCK_D)


@triton.jit
def flow_attention_bwd_query_kernel(
    grad_ptr,
    query_ptr,
    grad_query_ptr,
    sums_ptr,
    grad_sums_ptr,
    moments_ptr,
    of_k_ptr,
    grad_strides,
    query_strides,
    grad_query_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of queries, and their share in the gradient of of_k."""
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    # [BLOCK_D]
    of_k, of_given = load_sum(sums_ptr, head, OF_K, DIM, BLOCK_D), load_sum(sums_ptr, head, OF_GIVEN, DIM, BLOCK_D)
    grad_of_q = load_sum(grad_sums_ptr, head, OF_Q, DIM, BLOCK_D)
    grad_of_taken = load_sum(grad_sums_ptr, head, OF_TAKEN, DIM, BLOCK_D)
    # [BLOCK, BLOCK_D], [BLOCK]
    product = _times_transposed(
        grad_ptr, moments_ptr, places, plane, inside, grad_strides, head, (DIM, DIM_E), BLOCK, BLOCK_D, COLUMNS
    )
    features = load_features(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D)
    gate, taken = gate_of(features, (of_k, of_given), inside, epsilon, DIM)
    along = tl.sum(features * product, 1) * gate / taken
    by_taken = -(along + tl.sum(features * grad_of_taken[None, :], 1) / taken) / taken
    of_k_share = weighted_sum(features, by_taken, epsilon)
    store_vector(of_k_ptr, tl.program_id(0).to(tl.int64), of_k_share, DIM, BLOCK_D)
    numbers = along * (1 - gate), 1 / taken, by_taken
    vectors = of_given + epsilon, grad_of_taken, of_k + epsilon, grad_of_q
    grad_query = join(features, product * (gate / taken)[:, None], numbers, vectors)
    store_tokens(grad_query_ptr, grad_query, places, plane, inside, grad_query_strides, DIM, BLOCK_D)


@triton.jit
def flow_attention_bwd_key_kernel(
    key_ptr,
    value_ptr,
    grad_key_ptr,
    sums_ptr,
    grad_sums_ptr,
    partition_ptr,
    grad_moments_ptr,
    mean_ptr,
    key_strides,
    value_strides,
    grad_key_strides,
    heads,
    tokens,
    pieces,
    epsilon,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of keys."""
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    # [BLOCK_D]
    of_q, of_taken = load_sum(sums_ptr, head, OF_Q, DIM, BLOCK_D), load_sum(sums_ptr, head, OF_TAKEN, DIM, BLOCK_D)
    grad_of_k = load_sum(grad_sums_ptr, head, OF_K, DIM, BLOCK_D)
    grad_of_given = load_sum(grad_sums_ptr, head, OF_GIVEN, DIM, BLOCK_D)
    # [BLOCK, BLOCK_D], [BLOCK]
    product = _times_transposed(
        value_ptr, grad_moments_ptr, places, plane, inside, value_strides, head, (DIM, DIM_E), BLOCK, BLOCK_D, COLUMNS
    )
    features = load_features(key_ptr, places, plane, inside, key_strides, DIM, BLOCK_D)
    source = flow_of(features, of_taken, inside, epsilon, DIM)
    weight = weight_of(source, partition_ptr, head, tokens)
    by_source = gradient_of_source(tl.sum(features * product, 1), weight, source, mean_ptr, head, inside)
    given, by_given = given_of(features, of_q, grad_of_given, inside, epsilon, DIM)
    numbers = by_source, 1 / given, by_given
    vectors = of_taken + epsilon, grad_of_given, of_q + epsilon, grad_of_k
    grad_key = join(features, product * weight[:, None], numbers, vectors)
    store_tokens(grad_key_ptr, grad_key, places, plane, inside, grad_key_strides, DIM, BLOCK_D)
