"""Linear attention in Triton, the launchers: results allocated, tiles chosen, kernels run."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.launch import Launch, check_dtype, run
from visionattn_kernels.triton.linear_attention_kernels import (
    linear_attention_bwd_key_value_kernel,
    linear_attention_bwd_query_kernel,
    linear_attention_bwd_sums_kernel,
    linear_attention_fwd_kernel,
    linear_attention_sums_kernel,
)
from visionattn_kernels.triton.tiles import entry_of
from visionattn_kernels.triton.token_tiles import PIECE, TokenTiles, sum_launch, token_launch

# The tables, by bytes an element and padded dim, the wider of that of keys and of values. The rule is 64 tokens at a
# time, 32 channels of values, 4 warps and two stages. Where that spills a register on some chip, the entry is the first
# that does not of: 8 warps, 16 channels, half the tokens. Comments name the last choice that spilled and where;
# `tools/compile_kernels.py` shows that the entry does not.
SUMS = {
    (2, 16): TokenTiles(64, None, 4, 2),
    (2, 32): TokenTiles(64, None, 4, 2),
    (2, 64): TokenTiles(64, None, 4, 2),
    (2, 128): TokenTiles(16, None, 8, 2),  # 16 tokens with 4 warps: sm_80
    (4, 16): TokenTiles(64, None, 4, 2),
    (4, 32): TokenTiles(64, None, 4, 2),
    (4, 64): TokenTiles(16, None, 8, 2),  # 16 tokens with 4 warps: sm_100
    (4, 128): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
}
FORWARD = {
    (2, 16): TokenTiles(64, 32, 4, 2),
    (2, 32): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_100
    (2, 64): TokenTiles(64, 32, 4, 2),
    (2, 128): TokenTiles(64, 16, 4, 2),  # 32 channels with 8 warps: sm_80
    (4, 16): TokenTiles(64, 32, 4, 2),
    (4, 32): TokenTiles(64, 32, 4, 2),
    (4, 64): TokenTiles(64, 16, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(16, 16, 8, 2),  # 4 warps: sm_80
}
BACKWARD_QUERY = {
    (2, 16): TokenTiles(64, 32, 4, 2),
    (2, 32): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_100
    (2, 64): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
    (2, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 16): TokenTiles(64, 32, 4, 2),
    (4, 32): TokenTiles(64, 32, 4, 2),
    (4, 64): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(32, 16, 4, 2),  # 32 tokens and channels with 8 warps: gfx942
}
BACKWARD_SUMS = {
    (2, 16): TokenTiles(64, None, 4, 2),
    (2, 32): TokenTiles(64, None, 4, 2),
    (2, 64): TokenTiles(32, None, 8, 2),  # 4 warps: sm_100
    (2, 128): TokenTiles(16, None, 8, 2),  # 32 tokens: sm_80
    (4, 16): TokenTiles(64, None, 4, 2),
    (4, 32): TokenTiles(64, None, 4, 2),
    (4, 64): TokenTiles(32, None, 4, 2),  # 64 tokens with 8 warps: sm_80
    (4, 128): TokenTiles(16, None, 8, 2),
}
BACKWARD_KEY_VALUE = {
    (2, 16): TokenTiles(64, 32, 4, 2),
    (2, 32): TokenTiles(64, 32, 4, 2),
    (2, 64): TokenTiles(64, 16, 4, 2),  # 32 channels with 8 warps: sm_80
    (2, 128): TokenTiles(64, 16, 8, 2),  # 4 warps: sm_80
    (4, 16): TokenTiles(64, 32, 4, 2),
    (4, 32): TokenTiles(64, 32, 4, 2),
    (4, 64): TokenTiles(64, 32, 4, 2),
    (4, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
}


def forward_launches(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """Results of the forward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: The dtype or a head dim is not one that the kernels take.
    """
    check_dtype(query.dtype)
    out, means, pieces = empty_map(value), _means(query, value), _pieces(query, value)
    settings = _settings(rotary, feature_map)
    sums = dict(zip(("moments_ptr", "key_sums_ptr", "value_sums_ptr"), pieces, strict=True))
    keys, queries = {"key": key, "value": value}, {"query": query, "out": out}
    rule = _rule(means, query, scale, normalization, epsilon)
    return (out, *means), [
        token_launch(linear_attention_sums_kernel, SUMS, keys, value, 1, PIECE, **sums, **settings),
        *_mean_launches(pieces, means, query),
        token_launch(linear_attention_fwd_kernel, FORWARD, queries, value, 1, **rule, **settings),
    ]


def backward_launches(
    grad, query, key, value, scale, rotary, moments, key_mean, value_mean, normalization, feature_map, epsilon
):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Instead of the gradient of the scale there are its sums for each block of tokens, (B, heads, blocks) in float32.

    Raises:
        ValueError: As `forward_launches`.
    """
    check_dtype(query.dtype)
    batch, heads, tokens, _ = query.shape
    grad_query, grad_key, grad_value = (empty_map(x) for x in (query, key, value))
    grad_means, pieces = _means(query, value), _pieces(query, value)
    blocks = triton.cdiv(tokens, BACKWARD_QUERY[entry_of(query, value)].block)
    numbers, grad_scale = moments.new_empty((batch, heads, 3, tokens)), moments.new_empty((batch, heads, blocks))
    settings = _settings(rotary, feature_map)
    rule = _rule((moments, key_mean, value_mean), query, scale, normalization, epsilon)
    of_queries = {"numbers_ptr": numbers, "grad_scale_ptr": grad_scale, **rule, **settings}
    sums = dict(zip(("grad_moments_ptr", "grad_key_sums_ptr", "grad_value_sums_ptr"), pieces, strict=True))
    of_sums = {"numbers_ptr": numbers, **sums, **settings}
    of_keys = dict(zip(("grad_moments_ptr", "grad_key_mean_ptr", "grad_value_mean_ptr"), grad_means, strict=True))
    of_keys |= {"key_mean_ptr": key_mean, "value_mean_ptr": value_mean, "NORMALIZATION": normalization, **settings}
    queries = {"query": query, "grad": grad}
    keys = {"key": key, "value": value, "grad_key": grad_key, "grad_value": grad_value}
    return (grad_query, grad_key, grad_value, grad_scale), [
        token_launch(
            linear_attention_bwd_query_kernel,
            BACKWARD_QUERY,
            queries | {"grad_query": grad_query},
            value,
            1,
            **of_queries,
        ),
        token_launch(linear_attention_bwd_sums_kernel, BACKWARD_SUMS, queries, value, 1, PIECE, **of_sums),
        *_mean_launches(pieces, grad_means, query),
        token_launch(linear_attention_bwd_key_value_kernel, BACKWARD_KEY_VALUE, keys, value, 2, **of_keys),
    ]


def _means(query: Tensor, value: Tensor, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory in float32 for (B, heads, *lead, D, E), (B, heads, *lead, D) and (B, heads, *lead, E)."""
    batch, heads, _, dim = query.shape
    shapes = ((dim, value.shape[3]), (dim,), (value.shape[3],))
    return tuple(query.new_empty((batch, heads, *lead, *shape), dtype=torch.float32) for shape in shapes)


def _pieces(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_means` with an axis of pieces of tokens."""
    return _means(query, value, triton.cdiv(query.shape[2], PIECE))


def _settings(rotary: Tensor | None, feature_map: str) -> dict[str, Any]:
    """Arguments that all kernels take."""
    return {"rotary_ptr": None if rotary is None else rotary.contiguous(), "FEATURE_MAP": feature_map}


def _rule(means, query: Tensor, scale: Tensor, normalization: str, epsilon: float) -> dict[str, Any]:
    """Arguments of what normalises; `epsilon` of "division" is compared with means, not sums."""
    return {
        **dict(zip(("moments_ptr", "key_mean_ptr", "value_mean_ptr"), means, strict=True)),
        "scale_ptr": scale,
        "scale_stride": scale.stride(0),
        "epsilon": epsilon / query.shape[2] if normalization == "division" else epsilon,
        "NORMALIZATION": normalization,
    }


def _mean_launches(pieces, means, query: Tensor) -> list[Launch]:
    """Launches that make `means` of the sums in `pieces`."""
    return [sum_launch(piece, mean, 1 / query.shape[2]) for piece, mean in zip(pieces, means, strict=True)]


def forward(query, key, value, scale, rotary, normalization, feature_map, epsilon):
    """The forward on a GPU; arguments and results as of the op."""
    results, launches = forward_launches(query, key, value, scale, rotary, normalization, feature_map, epsilon)
    run(launches, query.device)
    return results


def backward(
    grad, query, key, value, scale, rotary, moments, key_mean, value_mean, normalization, feature_map, epsilon
):
    """The backward on a GPU; arguments and results as of the op."""
    means, settings = (moments, key_mean, value_mean), (normalization, feature_map, epsilon)
    (*grads, scale_sums), launches = backward_launches(grad, query, key, value, scale, rotary, *means, *settings)
    run(launches, query.device)
    return *grads, scale_sums.sum((0, 2)).to(scale.dtype)


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`, by variant, the one that does most last.

    "subtraction" alone centres keys and values, and "magnitude", as in MALA, turns features that are wide. What adds up
    pieces is the same in both.
    """
    query = empty_map(torch.empty(1, 2, 3136, dim, dtype=dtype, device=device)).zero_()
    scale = query.new_ones(2, dtype=torch.float32)
    angles = query.new_zeros(2, 3136, dim // 2, dtype=torch.float32)
    variants = {}
    for rotary, *rule in ((None, "subtraction", "identity", 1e-6), (angles, "magnitude", "elu_plus_one", 1e-6)):
        (_, *means), forward_launch = forward_launches(query, query, query, scale, rotary, *rule)
        _, backward_launch = backward_launches(query, query, query, query, scale, rotary, *means, *rule)
        variants[rule[0]] = forward_launch + backward_launch
    variants["subtraction"] = [launch for launch in variants["subtraction"] if launch.flops]
    return variants
