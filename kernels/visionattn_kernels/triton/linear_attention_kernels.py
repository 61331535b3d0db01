"""Linear attention in Triton, the kernels: means over tokens, the queries, and both backward.

`linear_attention_sums_kernel` sums keys times values, keys and values over a piece of the tokens, and
`linear_attention_fwd_kernel` applies the means to a block of queries. Backward, one kernel owns a block of queries: it
gives their gradient, and the numbers with which `linear_attention_bwd_sums_kernel` sums what they count in the
gradients of the means. The last owns a block of keys and applies those. Features, rotation and normalisation are
computed where they are needed, in float32; none of them is in memory.

Shapes: BLOCK tokens at a time; BLOCK_D channels of queries and keys, and BLOCK_E of values, all of them and padded;
COLUMNS channels of values at a time.
"""

import triton
import triton.language as tl

from visionattn_kernels.triton.tokens import (
    load_matrix,
    load_tokens,
    load_vector,
    locate_block,
    locate_tokens,
    store_matrix,
    store_tokens,
    store_vector,
    wide_dot,
)


@triton.jit
def _features(x, FEATURE_MAP: tl.constexpr):
    """The feature map of x."""
    if FEATURE_MAP == "relu":
        x = tl.maximum(x, 0.0)
    elif FEATURE_MAP == "elu_plus_one":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return x


@triton.jit
def _times_slope(grad, features, FEATURE_MAP: tl.constexpr):
    """`grad` times the derivative of the feature map, told from its result."""
    if FEATURE_MAP == "relu":
        grad = tl.where(features > 0, grad, 0.0)
    elif FEATURE_MAP == "elu_plus_one":
        grad = grad * tl.minimum(features, 1.0)
    return grad


@triton.jit
def _turn(
    x,
    rotary_ptr,
    places,
    inside,
    tokens,
    BACK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D] x with its pairs of channels turned by the angles of their tokens, or back.

    `rotary_ptr` leads to cosines and sines, contiguous (2, N, D / 2), or is None: then x stays as it is.
    """
    if rotary_ptr is not None:
        pair = tl.arange(0, BLOCK_D // 2)
        # [BLOCK, BLOCK_D / 2]
        exists = inside[:, None] & (pair < DIM // 2)[None, :]
        pointers = rotary_ptr + places.to(tl.int64)[:, None] * (DIM // 2) + pair[None, :]
        cos = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
        sin = tl.load(pointers + tokens.to(tl.int64) * (DIM // 2), mask=exists, other=0.0).to(tl.float32)
        if BACK:
            sin = -sin
        first, second = tl.split(tl.reshape(x, [BLOCK, BLOCK_D // 2, 2]))
        x = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), [BLOCK, BLOCK_D])
    return x


@triton.jit
def _covariance(
    means, head, first, NORMALIZATION: tl.constexpr, DIMS: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr
):
    """[BLOCK_D, COLUMNS] moments of channels from `first` on, for "subtraction" without the product of the means."""
    moments_ptr, key_mean_ptr, value_mean_ptr = means
    moments = load_matrix(moments_ptr, head, DIMS, (BLOCK_D, COLUMNS), first)
    if NORMALIZATION == "subtraction":
        key_mean = load_vector(key_mean_ptr, head, DIMS[0], BLOCK_D)
        moments -= key_mean[:, None] * load_vector(value_mean_ptr, head, DIMS[1], COLUMNS, first)[None, :]
    return moments


@triton.jit
def _numbers(ptr, places, plane, heads, tokens):
    """[BLOCK] pointers to the first number of tokens of a head, of a contiguous (B, heads, 3, N)."""
    return ptr + (plane[0] * heads + plane[1]) * 3 * tokens + places


@triton.jit
def _sum_piece(
    tensors,
    numbers_ptr,
    sums,
    strides,
    sizes,
    FEATURE_MAP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums over a piece of the tokens: turned features of keys times values, features, and values.

    Where `numbers_ptr` is not None, each token counts in each of the three as much as its number for that sum says.
    `tensors` are pointers to keys, values and rotary, `sums` to the three; `sizes` are heads, tokens and pieces.
    """
    key_ptr, value_ptr, rotary_ptr = tensors
    heads, tokens, pieces = sizes
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    weighted: tl.constexpr = numbers_ptr is not None
    wide: tl.constexpr = FEATURE_MAP == "elu_plus_one" or rotary_ptr is not None or weighted
    plane, piece = locate_tokens(heads, pieces)
    # [BLOCK_D, BLOCK_E], [BLOCK_D], [BLOCK_E]
    moments = tl.zeros([BLOCKS[0], BLOCKS[1]], tl.float32)
    key_sums = tl.zeros([BLOCKS[0]], tl.float32)
    value_sums = tl.zeros([BLOCKS[1]], tl.float32)
    for start in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < tokens
        # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E]; the feature of a zero need not be zero
        features = _features(load_tokens(key_ptr, places, plane, inside, strides[0], DIMS[0], BLOCKS[0]), FEATURE_MAP)
        features = tl.where(inside[:, None], features, 0.0)
        values = load_tokens(value_ptr, places, plane, inside, strides[1], DIMS[1], BLOCKS[1])
        turned = _turn(features, rotary_ptr, places, inside, tokens, False, DIMS[0], BLOCK, BLOCKS[0])
        if weighted:
            pointers = _numbers(numbers_ptr, places, plane, heads, tokens)
            key_sums += tl.sum(features * tl.load(pointers + tokens, mask=inside, other=0.0)[:, None], 0)
            value_sums += tl.sum(values * tl.load(pointers + 2 * tokens, mask=inside, other=0.0)[:, None], 0)
            turned = turned * tl.load(pointers, mask=inside, other=0.0)[:, None]
        else:
            key_sums += tl.sum(features, 0)
            value_sums += tl.sum(values, 0)
        moments += wide_dot(tl.trans(turned), values, dtype, wide, False)
    number = tl.program_id(0).to(tl.int64)
    store_matrix(sums[0], number, moments, DIMS, BLOCKS)
    store_vector(sums[1], number, key_sums, DIMS[0], BLOCKS[0])
    store_vector(sums[2], number, value_sums, DIMS[1], BLOCKS[1])


@triton.jit
def linear_attention_sums_kernel(
    key_ptr,
    value_ptr,
    rotary_ptr,
    moments_ptr,
    key_sums_ptr,
    value_sums_ptr,
    key_strides,
    value_strides,
    heads,
    tokens,
    pieces,
    FEATURE_MAP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums over a piece of the tokens: turned features of keys times values, features, and values."""
    tensors, strides = (key_ptr, value_ptr, rotary_ptr), (key_strides, value_strides)
    sums, sizes = (moments_ptr, key_sums_ptr, value_sums_ptr), (heads, tokens, pieces)
    _sum_piece(tensors, None, sums, strides, sizes, FEATURE_MAP, PIECE, BLOCK, (DIM, DIM_E), (BLOCK_D, BLOCK_E))


@triton.jit
def linear_attention_bwd_sums_kernel(
    query_ptr,
    grad_ptr,
    rotary_ptr,
    numbers_ptr,
    grad_moments_ptr,
    grad_key_sums_ptr,
    grad_value_sums_ptr,
    query_strides,
    grad_strides,
    heads,
    tokens,
    pieces,
    FEATURE_MAP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The same backward: gradients of the means from queries, gradients of their results, and three numbers a token."""
    tensors, strides = (query_ptr, grad_ptr, rotary_ptr), (query_strides, grad_strides)
    sums, sizes = (grad_moments_ptr, grad_key_sums_ptr, grad_value_sums_ptr), (heads, tokens, pieces)
    _sum_piece(tensors, numbers_ptr, sums, strides, sizes, FEATURE_MAP, PIECE, BLOCK, (DIM, DIM_E), (BLOCK_D, BLOCK_E))


@triton.jit
def linear_attention_fwd_kernel(
    query_ptr,
    scale_ptr,
    rotary_ptr,
    moments_ptr,
    key_mean_ptr,
    value_mean_ptr,
    out_ptr,
    query_strides,
    out_strides,
    scale_stride,
    heads,
    tokens,
    pieces,
    epsilon,
    NORMALIZATION: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Results of a block of queries. `epsilon` is that over N for "division"."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    wide: tl.constexpr = FEATURE_MAP == "elu_plus_one" or rotary_ptr is not None
    means = moments_ptr, key_mean_ptr, value_mean_ptr
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    scale = tl.load(scale_ptr + plane[1] * scale_stride).to(tl.float32)
    # [BLOCK, BLOCK_D]
    features = _features(load_tokens(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D), FEATURE_MAP)
    # [BLOCK]
    z = tl.sum(features * load_vector(key_mean_ptr, head, DIM, BLOCK_D)[None, :], 1)
    turned = _turn(features, rotary_ptr, places, inside, tokens, False, DIM, BLOCK, BLOCK_D)
    if NORMALIZATION == "division":
        gain = scale / tl.maximum(z, epsilon)
    else:
        z = z * scale
        gain = scale * (1 + 1 / (z + epsilon))
    for first in range(0, DIM_E, COLUMNS):
        moments = _covariance(means, head, first, NORMALIZATION, (DIM, DIM_E), BLOCK_D, COLUMNS)
        value_mean = load_vector(value_mean_ptr, head, DIM_E, COLUMNS, first)
        # [BLOCK, COLUMNS]
        out = wide_dot(turned, moments, dtype, wide, True)
        if NORMALIZATION == "division":
            out = out * gain[:, None]
        elif NORMALIZATION == "subtraction":
            out = out * scale + value_mean[None, :]
        else:
            out = out * gain[:, None] - z[:, None] * value_mean[None, :]
        store_tokens(out_ptr, out, places, plane, inside, out_strides, DIM_E, COLUMNS, first)


@triton.jit
def _normalisation_backward(along, along_mean, z, scale, epsilon, NORMALIZATION: tl.constexpr):
    """What the gradient of queries' results says of their normalisation; all [BLOCK].

    `along` is the inner product of the turned features with the gradient times the moments, `along_mean` that of the
    gradient with the mean value, `z` that of the features with the mean key.

    Returns:
        The gain, the gradients of scale and of z, and what the gradient is multiplied with in that of the mean value.
        For "subtraction" the last kernel takes the means off keys and values, so that the mean key has no gradient.
    """
    if NORMALIZATION == "division":
        divisor = tl.maximum(z, epsilon)
        gain, by_scale = scale / divisor, along / divisor
        by_z, by_value = tl.where(z >= epsilon, -gain * by_scale, 0.0), tl.zeros_like(z)
    elif NORMALIZATION == "subtraction":
        gain, by_scale = tl.zeros_like(z) + scale, along
        by_z, by_value = tl.zeros_like(z), tl.zeros_like(z) + 1
    else:
        inverse = 1 / (z * scale + epsilon)
        by_scaled_z = -scale * inverse * inverse * along - along_mean
        gain, by_scale = scale * (1 + inverse), (1 + inverse) * along + z * by_scaled_z
        by_z, by_value = scale * by_scaled_z, -z * scale
    return gain, by_scale, by_z, by_value


@triton.jit
def linear_attention_bwd_query_kernel(
    grad_ptr,
    query_ptr,
    scale_ptr,
    rotary_ptr,
    moments_ptr,
    key_mean_ptr,
    value_mean_ptr,
    grad_query_ptr,
    numbers_ptr,
    grad_scale_ptr,
    grad_strides,
    query_strides,
    grad_query_strides,
    scale_stride,
    heads,
    tokens,
    pieces,
    epsilon,
    NORMALIZATION: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of queries, the block's share of the scale's, and three numbers a token."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    means = moments_ptr, key_mean_ptr, value_mean_ptr
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    scale = tl.load(scale_ptr + plane[1] * scale_stride).to(tl.float32)
    key_mean = load_vector(key_mean_ptr, head, DIM, BLOCK_D)
    # [BLOCK, BLOCK_D], [BLOCK]
    grad_turned = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    along_mean = tl.zeros([BLOCK], tl.float32)
    for first in range(0, DIM_E, COLUMNS):
        moments = _covariance(means, head, first, NORMALIZATION, (DIM, DIM_E), BLOCK_D, COLUMNS)
        # [BLOCK, COLUMNS]
        grad = load_tokens(grad_ptr, places, plane, inside, grad_strides, DIM_E, COLUMNS, first)
        along_mean += tl.sum(grad * load_vector(value_mean_ptr, head, DIM_E, COLUMNS, first)[None, :], 1)
        grad_turned += wide_dot(grad, tl.trans(moments), dtype, False, True)
    # [BLOCK, BLOCK_D]
    features = _features(load_tokens(query_ptr, places, plane, inside, query_strides, DIM, BLOCK_D), FEATURE_MAP)
    turned = _turn(features, rotary_ptr, places, inside, tokens, False, DIM, BLOCK, BLOCK_D)
    # [BLOCK]; what is not there has no gradient, but it must not divide by zero
    z = tl.where(inside, tl.sum(features * key_mean[None, :], 1), 1.0)
    gain, by_scale, by_z, by_value = _normalisation_backward(
        tl.sum(turned * grad_turned, 1), along_mean, z, scale, epsilon, NORMALIZATION
    )
    tl.store(grad_scale_ptr + tl.program_id(0), tl.sum(by_scale))
    pointers = _numbers(numbers_ptr, places, plane, heads, tokens)
    tl.store(pointers, gain, mask=inside)
    tl.store(pointers + tokens, by_z, mask=inside)
    tl.store(pointers + 2 * tokens, by_value, mask=inside)
    # [BLOCK, BLOCK_D]
    grad_query = grad_turned * gain[:, None]
    grad_query = _turn(grad_query, rotary_ptr, places, inside, tokens, True, DIM, BLOCK, BLOCK_D)
    grad_query = _times_slope(grad_query + by_z[:, None] * key_mean[None, :], features, FEATURE_MAP)
    store_tokens(grad_query_ptr, grad_query, places, plane, inside, grad_query_strides, DIM, BLOCK_D)


@triton.jit
def linear_attention_bwd_key_value_kernel(
    key_ptr,
    value_ptr,
    rotary_ptr,
    key_mean_ptr,
    value_mean_ptr,
    grad_moments_ptr,
    grad_key_mean_ptr,
    grad_value_mean_ptr,
    grad_key_ptr,
    grad_value_ptr,
    key_strides,
    value_strides,
    grad_key_strides,
    grad_value_strides,
    heads,
    tokens,
    pieces,
    NORMALIZATION: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a block of keys and of its values, from those of the means."""
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    centred: tl.constexpr = NORMALIZATION == "subtraction"
    wide: tl.constexpr = FEATURE_MAP == "elu_plus_one" or rotary_ptr is not None or centred
    plane, head, places, inside = locate_block(heads, tokens, pieces, BLOCK)
    # [BLOCK, BLOCK_D]
    grad_key = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, DIM_E, COLUMNS):
        # [BLOCK_D, COLUMNS], [BLOCK, COLUMNS]
        grad_moments = load_matrix(grad_moments_ptr, head, (DIM, DIM_E), (BLOCK_D, COLUMNS), first)
        values = load_tokens(value_ptr, places, plane, inside, value_strides, DIM_E, COLUMNS, first)
        if centred:
            values -= load_vector(value_mean_ptr, head, DIM_E, COLUMNS, first)[None, :]
        grad_key += wide_dot(values, tl.trans(grad_moments), dtype, centred, True)
    grad_key = _turn(grad_key, rotary_ptr, places, inside, tokens, True, DIM, BLOCK, BLOCK_D)
    grad_key += load_vector(grad_key_mean_ptr, head, DIM, BLOCK_D)[None, :]
    features = _features(load_tokens(key_ptr, places, plane, inside, key_strides, DIM, BLOCK_D), FEATURE_MAP)
    grad_key = _times_slope(grad_key, features, FEATURE_MAP)
    store_tokens(grad_key_ptr, grad_key, places, plane, inside, grad_key_strides, DIM, BLOCK_D)
    # The loop for values is one of its own: with both products in one, registers spill from 64 channels on.
    turned = _turn(features, rotary_ptr, places, inside, tokens, False, DIM, BLOCK, BLOCK_D)
    if centred:
        turned -= load_vector(key_mean_ptr, head, DIM, BLOCK_D)[None, :]
    for first in range(0, DIM_E, COLUMNS):
        grad_moments = load_matrix(grad_moments_ptr, head, (DIM, DIM_E), (BLOCK_D, COLUMNS), first)
        # [BLOCK, COLUMNS]
        grad_value = wide_dot(turned, grad_moments, dtype, wide, True)
        grad_value += load_vector(grad_value_mean_ptr, head, DIM_E, COLUMNS, first)[None, :]
        store_tokens(grad_value_ptr, grad_value, places, plane, inside, grad_value_strides, DIM_E, COLUMNS, first)
