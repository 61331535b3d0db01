"""Flow attention in Triton, the launchers: results allocated, tiles chosen, kernels run."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from visionattn_kernels.layout import empty_map
from visionattn_kernels.triton.flow_attention_kernels import (
    flow_attention_bwd_key_kernel,
    flow_attention_bwd_moments_kernel,
    flow_attention_bwd_query_kernel,
    flow_attention_bwd_sink_kernel,
    flow_attention_bwd_value_kernel,
    flow_attention_flow_sums_kernel,
    flow_attention_fwd_kernel,
    flow_attention_moments_kernel,
    flow_attention_sums_kernel,
)
from visionattn_kernels.triton.launch import Launch, check_dtype, run
from visionattn_kernels.triton.tiles import entry_of
from visionattn_kernels.triton.token_tiles import PIECE, TokenTiles, sum_launch, token_launch

# The tables, by bytes an element and padded dim, the wider of that of keys and of values. The rule is 64 tokens at a
# time, 32 channels of values, 4 warps and two stages. Where that spills a register on some chip, the entry is the first
# that does not of: 8 warps, 16 channels, half the tokens. Comments name the last choice that spilled and where;
# `tools/compile_kernels.py` shows that the entry does not.
_ENTRIES = [(size, dim) for size in (2, 4) for dim in (16, 32, 64, 128)]
_PIECES = dict.fromkeys(_ENTRIES, TokenTiles(64, None, 4, 2))
_BLOCKS = dict.fromkeys(_ENTRIES, TokenTiles(64, 32, 4, 2))
SUMS = _PIECES
FLOW_SUMS = _PIECES | {
    (2, 128): TokenTiles(64, None, 8, 2),  # 4 warps: sm_100
}
MOMENTS = _PIECES | {
    (2, 64): TokenTiles(64, None, 8, 2),  # 4 warps: sm_100
    (2, 128): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
    (4, 64): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
}
FORWARD = _BLOCKS | {
    (2, 128): TokenTiles(64, 16, 4, 2),  # 32 channels with 8 warps: sm_80
    (4, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
}
BACKWARD_SINK = _BLOCKS
BACKWARD_MOMENTS = _PIECES | {
    (2, 128): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
    (4, 64): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(32, None, 8, 2),  # 4 warps: sm_80
}
BACKWARD_VALUE = _BLOCKS | {
    (2, 128): TokenTiles(16, 32, 4, 2),  # 32 tokens and 16 channels with 8 warps: sm_80
    (4, 64): TokenTiles(64, 16, 4, 2),  # 32 channels with 8 warps: sm_90
    (4, 128): TokenTiles(64, 16, 4, 2),  # 32 channels with 8 warps: gfx942
}
BACKWARD_QUERY = _BLOCKS | {
    (2, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
}
BACKWARD_KEY = _BLOCKS | {
    (2, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
    (4, 128): TokenTiles(64, 32, 8, 2),  # 4 warps: sm_80
}


def forward_launches(query, key, value, epsilon):
    """Results of the forward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: The dtype or a head dim is not one that the kernels take.
    """
    check_dtype(query.dtype)
    tokens, dim, dim_e = *query.shape[2:], value.shape[3]
    pieces = triton.cdiv(tokens, PIECE)
    out, vectors = empty_map(value), _memory(query, pieces, 2, dim)
    moments, sums, partition = (_memory(query, *shape) for shape in ((dim, dim_e), (4, dim), ()))
    moment_sums, partition_sums = _memory(query, pieces, dim, dim_e), _memory(query, pieces)
    both, keys, queries = {"query": query, "key": key}, {"key": key, "value": value}, {"query": query, "out": out}
    flows = {"sums_ptr": sums, "epsilon": epsilon}
    of_keys = {"moments_ptr": moment_sums, "partition_ptr": partition_sums, **flows}
    return (out, moments, sums, partition), [
        token_launch(flow_attention_sums_kernel, SUMS, both, None, 0, PIECE, pieces_ptr=vectors),
        sum_launch(vectors, sums[:, :, :2], 1.0),
        token_launch(flow_attention_flow_sums_kernel, FLOW_SUMS, both, None, 0, PIECE, pieces_ptr=vectors, **flows),
        sum_launch(vectors, sums[:, :, 2:], 1.0),
        token_launch(flow_attention_moments_kernel, MOMENTS, keys, value, 1, PIECE, **of_keys),
        sum_launch(partition_sums, partition, 1.0),
        sum_launch(moment_sums, moments, float(tokens), partition),
        token_launch(flow_attention_fwd_kernel, FORWARD, queries, value, 1, moments_ptr=moments, **flows),
    ]


def backward_launches(grad, query, key, value, moments, sums, partition, epsilon):
    """Results of the backward, not yet filled, and the launches that fill them; arguments and results as of the op.

    Raises:
        ValueError: As `forward_launches`.
    """
    check_dtype(query.dtype)
    tokens, dim, dim_e = *query.shape[2:], value.shape[3]
    grad_query, grad_key, grad_value = gradients = tuple(empty_map(x) for x in (query, key, value))
    grad_moments, grad_sums, mean = (_memory(query, *shape) for shape in ((dim, dim_e), (4, dim), ()))
    of_q, of_k, of_taken, of_given = grad_sums.unbind(2)
    moment_sums = _memory(query, triton.cdiv(tokens, PIECE), dim, dim_e)

    def shares(table: dict[tuple[int, int], TokenTiles], *shape: int) -> Tensor:
        """What each block of tokens adds to a sum."""
        return _memory(query, triton.cdiv(tokens, table[entry_of(query, value)].block), *shape)

    given, means, taken = shares(BACKWARD_SINK, dim), shares(BACKWARD_SINK), shares(BACKWARD_VALUE, dim)
    queries, keys = shares(BACKWARD_VALUE, dim), shares(BACKWARD_QUERY, dim)
    flows = {"sums_ptr": sums, "epsilon": epsilon}
    grad_flows = {"grad_sums_ptr": grad_sums, **flows}
    of_sinks = {"moments_ptr": moments, "of_given_ptr": given, "mean_ptr": means, **flows}
    of_moments = {"grad_moments_ptr": moment_sums, **flows}
    of_keys = {"partition_ptr": partition, "grad_moments_ptr": grad_moments, "mean_ptr": mean, **grad_flows}
    of_values = {"of_q_ptr": queries, "of_taken_ptr": taken, **of_keys}
    of_queries = {"moments_ptr": moments, "of_k_ptr": keys, **grad_flows}
    grads, pairs = {"query": query, "grad": grad}, {"key": key, "value": value}
    to_query, to_key, to_value = {"grad_query": grad_query}, {"grad_key": grad_key}, {"grad_value": grad_value}
    return gradients, [
        token_launch(flow_attention_bwd_sink_kernel, BACKWARD_SINK, grads, value, 1, **of_sinks),
        sum_launch(given, of_given, 1.0),
        sum_launch(means, mean, 1 / tokens),
        token_launch(flow_attention_bwd_moments_kernel, BACKWARD_MOMENTS, grads, value, 1, PIECE, **of_moments),
        sum_launch(moment_sums, grad_moments, 1.0),
        token_launch(flow_attention_bwd_value_kernel, BACKWARD_VALUE, pairs | to_value, value, 1, **of_values),
        sum_launch(queries, of_q, 1.0),
        sum_launch(taken, of_taken, 1.0),
        token_launch(flow_attention_bwd_query_kernel, BACKWARD_QUERY, grads | to_query, value, 1, **of_queries),
        sum_launch(keys, of_k, 1.0),
        token_launch(flow_attention_bwd_key_kernel, BACKWARD_KEY, pairs | to_key, value, 1, **of_keys),
    ]


def _memory(query: Tensor, *shape: int) -> Tensor:
    """Memory in float32 for (B, heads, *shape)."""
    return query.new_empty((*query.shape[:2], *shape), dtype=torch.float32)


def forward(query, key, value, epsilon):
    """The forward on a GPU; arguments and results as of the op."""
    results, launches = forward_launches(query, key, value, epsilon)
    run(launches, query.device)
    return results


def backward(grad, query, key, value, moments, sums, partition, epsilon):
    """The backward on a GPU; arguments and results as of the op."""
    gradients, launches = backward_launches(grad, query, key, value, moments, sums, partition, epsilon)
    run(launches, query.device)
    return gradients


def examples(dtype: torch.dtype, dim: int, device: str) -> dict[str, list[Launch]]:
    """Launches that use the entries of all tables for `dtype` and `dim`, in one variant."""
    query = empty_map(torch.empty(1, 2, 3136, dim, dtype=dtype, device=device)).zero_()
    (_, *inner), forward_launch = forward_launches(query, query, query, 1e-6)
    _, backward_launch = backward_launches(query, query, query, query, *inner, 1e-6)
    return {"": forward_launch + backward_launch}
